// Pictures, sounds and clips, decoded by the browser to the arrays that the model's own graphs preprocess.
//
// PNG, GIF, WebP and BMP come out as they are stored, and WAV does where its rate is the model's. JPEG and videos are decoded by
// the browser's own decoders, and sound of another rate is resampled by its resampler: these differ a little between browsers.

import { WasatError } from "./device.js";

const MOST_PIXELS = 80_000_000;
const MOST_SIDE = 65_535;
const MOST_SECONDS = 3600;
const CLIP_FRAMES = 64; // taken of a video, evenly
const CLIP_RATE = 25; // and at most so many a second
const GIF_DELAY = 0.1; // seconds that a frame without a duration shows

/** Which kind a Blob, or a decoded medium { kind, .. }, is, and what encoders of that kind take. */
export async function arraysOf(medium, encoders, device) {
  const kind = medium instanceof Blob ? await kindOf(medium) : medium.kind;
  const encoder = encoders.find((e) => e.kind === kind);
  if (!encoder) {
    const takes = ["text", ...encoders.map((e) => e.kind)].join(", ");
    throw new WasatError(`${medium.name ?? "this"} is ${kind ?? "of a kind that is not known here"}; the model takes ${takes}`);
  }
  if (!(medium instanceof Blob)) return { kind, inputs: medium.inputs };
  const read = { image: pixels, audio: samples, video: frames }[kind];
  try {
    return { kind, inputs: await read(medium, encoder, device) };
  } catch (e) {
    if (e instanceof WasatError) throw e;
    throw new WasatError(`${medium.name ?? "the file"} cannot be read (${e.message}): is it damaged, or of a format that this browser lacks?`);
  }
}

async function kindOf(blob) {
  const head = new Uint8Array(await blob.slice(0, 16).arrayBuffer());
  const text = String.fromCharCode(...head);
  if (text.startsWith("GIF8") || (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP")) return (await framesIn(blob)) > 1 ? "video" : "image";
  if (text.startsWith("\x89PNG") || text.startsWith("\xff\xd8\xff") || text.startsWith("BM")) return "image";
  if (text.startsWith("RIFF") && text.slice(8, 12) === "WAVE") return "audio";
  if (text.startsWith("fLaC") || text.startsWith("ID3") || text.startsWith("OggS") || (head[0] === 0xff && (head[1] & 0xe0) === 0xe0)) return "audio";
  return ["image", "audio", "video"].find((kind) => blob.type.startsWith(`${kind}/`));
}

const plain = { colorSpaceConversion: "none", premultiplyAlpha: "none" };

async function pixels(blob, encoder, device) {
  const bitmap = await createImageBitmap(blob, { ...plain, imageOrientation: "from-image" });
  const { data, shape } = await rgb(bitmap, device);
  bitmap.close();
  return { image: { data, shape } };
}

/** u8[h, w, 3] of what can be drawn: through a texture, since a canvas multiplies colours by their opacity and loses digits. */
async function rgb(source, { gpu }) {
  const { width: w, height: h } = source;
  if (!w || !h) throw new WasatError(`it has ${w} x ${h} pixels: nothing to see`);
  if (Math.max(w, h) > MOST_SIDE || w * h > MOST_PIXELS || Math.max(w, h) > gpu.limits.maxTextureDimension2D) {
    throw new WasatError(`it has ${w} x ${h} pixels, more than are decoded here: make it smaller first`);
  }
  const usage = GPUTextureUsage.COPY_DST | GPUTextureUsage.COPY_SRC | GPUTextureUsage.RENDER_ATTACHMENT;
  const texture = gpu.createTexture({ size: [w, h], format: "rgba8unorm", usage });
  gpu.queue.copyExternalImageToTexture({ source }, { texture, premultipliedAlpha: false }, [w, h]);
  const bytesPerRow = Math.ceil((4 * w) / 256) * 256;
  const memory = gpu.createBuffer({ size: bytesPerRow * h, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
  const encoder = gpu.createCommandEncoder();
  encoder.copyTextureToBuffer({ texture }, { buffer: memory, bytesPerRow }, [w, h]);
  gpu.queue.submit([encoder.finish()]);
  await memory.mapAsync(GPUMapMode.READ);
  const bytes = new Uint8Array(memory.getMappedRange());
  const data = new Uint8Array(3 * w * h);
  for (let y = 0, to = 0; y < h; y++) {
    for (let x = 0, at = y * bytesPerRow; x < w; x++, at += 4) {
      const opacity = bytes[at + 3]; // over white
      for (let c = 0; c < 3; c++) data[to++] = opacity === 255 ? bytes[at + c] : Math.floor((bytes[at + c] * opacity + 255 * (255 - opacity) + 127) / 255);
    }
  }
  memory.destroy();
  texture.destroy();
  return { data, shape: [h, w, 3] };
}

async function samples(blob, encoder) {
  const bytes = await blob.arrayBuffer();
  const wave = wav(bytes);
  if (wave && wave.rate === encoder.rate) return { audio: { data: wave.data, shape: [wave.data.length] } };
  const decoded = await new OfflineAudioContext(1, 1, encoder.rate).decodeAudioData(bytes); // which resamples to its rate
  if (decoded.duration > MOST_SECONDS) throw new WasatError(`it is longer than ${MOST_SECONDS} s: cut it first`);
  const n = decoded.length;
  const mean = new Float32Array(n);
  for (let c = 0; c < decoded.numberOfChannels; c++) decoded.getChannelData(c).forEach((x, i) => { mean[i] += x / decoded.numberOfChannels; });
  if (!n) throw new WasatError("it holds no sound");
  return { audio: { data: mean, shape: [n] } };
}

/** The samples of a WAV of PCM or floats, exactly; null for what else lies in one. */
function wav(bytes) {
  const view = new DataView(bytes);
  const name = (at) => String.fromCharCode(...new Uint8Array(bytes, at, 4));
  if (bytes.byteLength < 44 || name(0) !== "RIFF" || name(8) !== "WAVE") return null;
  let format = null;
  for (let at = 12; at + 8 <= bytes.byteLength;) {
    const [chunk, size] = [name(at), view.getUint32(at + 4, true)];
    at += 8;
    if (chunk === "fmt " && at + 16 <= bytes.byteLength) {
      const code = view.getUint16(at, true);
      format = {
        code: code === 0xfffe && size >= 26 ? view.getUint16(at + 24, true) : code, channels: view.getUint16(at + 2, true),
        rate: view.getUint32(at + 4, true), bits: view.getUint16(at + 14, true),
      };
    }
    if (chunk === "data" && format) {
      if (at + size > bytes.byteLength) throw new WasatError(`it is cut off: it has ${bytes.byteLength} bytes of ${at + size}`);
      return decoded(view, at, size, format);
    }
    at += size + (size % 2);
  }
  return null;
}

function decoded(view, start, size, { code, channels, rate, bits }) {
  const read = {
    "1:8": (at) => (view.getUint8(at) - 128) / 128, "1:16": (at) => view.getInt16(at, true) / 2 ** 15,
    "1:24": (at) => ((view.getUint8(at) | (view.getUint8(at + 1) << 8) | (view.getInt8(at + 2) << 16)) / 2 ** 23),
    "1:32": (at) => view.getInt32(at, true) / 2 ** 31, "3:32": (at) => view.getFloat32(at, true), "3:64": (at) => view.getFloat64(at, true),
  }[`${code}:${bits}`];
  if (!read || !channels) return null;
  if (!rate) throw new WasatError("it states a rate of 0 Hz: write it again with its samples per second");
  const width = bits / 8;
  const n = Math.floor(size / width / channels);
  if (!n) throw new WasatError("it holds no sound");
  if (n > MOST_SECONDS * rate) throw new WasatError(`it is longer than ${MOST_SECONDS} s: cut it first`);
  const data = new Float32Array(n);
  for (let i = 0, at = start; i < n; i++) {
    let sum = 0;
    for (let c = 0; c < channels; c++, at += width) sum = Math.fround(sum + Math.fround(read(at)));
    data[i] = sum / channels;
  }
  if (!data.every(Number.isFinite)) throw new WasatError("it holds samples that are infinite or no numbers");
  return { data, rate };
}

async function framesIn(blob) {
  if (!globalThis.ImageDecoder) return 1;
  const decoder = new ImageDecoder({ data: blob.stream(), type: (await blob.slice(0, 3).text()) === "GIF" ? "image/gif" : "image/webp" });
  await decoder.completed;
  const n = decoder.tracks.selectedTrack?.frameCount ?? 1;
  decoder.close();
  return n;
}

async function frames(blob, encoder, device) {
  const head = new Uint8Array(await blob.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...head);
  const drawn = text.startsWith("GIF8") || text.startsWith("RIFF") ? pictures(blob, text.startsWith("GIF8"), device) : seeked(blob, device);
  const parts = [];
  const times = [];
  for await (const { image, at } of drawn) {
    parts.push(image);
    times.push(at);
  }
  if (!parts.length) throw new WasatError("it holds no frames");
  const [h, w] = parts[0].shape;
  const data = new Uint8Array(parts.length * 3 * h * w);
  parts.forEach((p, i) => {
    if (`${p.shape}` !== `${parts[0].shape}`) throw new WasatError("its frames differ in size");
    data.set(p.data, i * 3 * h * w);
  });
  return { frames: { data, shape: [parts.length, h, w, 3] }, times: { data: times.map((t) => t - times[0]), shape: [parts.length] } };
}

/** Every frame of a GIF or animated WebP. */
async function* pictures(blob, gif, device) {
  const decoder = new ImageDecoder({ data: blob.stream(), type: gif ? "image/gif" : "image/webp", ...plain });
  await decoder.completed;
  let at = 0;
  for (let i = 0; i < decoder.tracks.selectedTrack.frameCount; i++) {
    const { image } = await decoder.decode({ frameIndex: i });
    const bitmap = await createImageBitmap(image, plain); // not every browser copies a decoded frame to a texture
    yield { image: await rgb(bitmap, device), at };
    at += (image.duration ?? 0) / 1e6 || GIF_DELAY;
    bitmap.close();
    image.close();
  }
  decoder.close();
}

/** Frames of a video at even times: what it shows after seeking there. */
async function* seeked(blob, device) {
  const video = document.createElement("video");
  const url = URL.createObjectURL(blob);
  const next = (name) => new Promise((done, fail) => {
    video.addEventListener(name, done, { once: true });
    video.addEventListener("error", () => fail(new Error(video.error?.message || "the browser cannot play it")), { once: true });
  });
  try {
    Object.assign(video, { muted: true, preload: "auto", playsInline: true, src: url });
    await next("loadeddata");
    const seconds = Number.isFinite(video.duration) ? video.duration : 0;
    const n = Math.max(1, Math.min(Math.floor(seconds * CLIP_RATE), CLIP_FRAMES));
    for (let i = 0; i < n; i++) {
      const at = (seconds * i) / n;
      const there = next("seeked");
      video.currentTime = at + seconds / n / 1000;
      await there;
      const bitmap = await createImageBitmap(video, plain);
      yield { image: await rgb(bitmap, device), at };
      bitmap.close();
    }
  } finally {
    video.removeAttribute("src");
    URL.revokeObjectURL(url);
  }
}
