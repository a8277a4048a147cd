// A model that `wasat export --web` wrote: loading, sessions with caches on the GPU, generation.
//
//     import { load } from "./model.js";
//     const model = await load(".", (what, done, total) => console.log(what, done, total));
//     for await (const piece of model.generate(["a prompt"], { maxTokens: 50 })) console.log(piece);

import { Device, WasatError } from "./device.js";
import { arraysOf } from "./media.js";
import { Host, count, value } from "./plan.js";
import { Sampler } from "./sampling.js";
import { Tokenizer } from "./text.js";

export { WasatError };

const FORMAT = 1;
const CACHE = "wasat-weights";
const COUNTED = ["positions", "position_ids", "cache_position"];
const FIRST = 256; // capacity of growing states when a session opens

/** Fetches a file of the folder and holds it against its hash; what is large is kept in the browser's cache. */
async function file(base, name, spec, onBytes = () => {}) {
  const url = new URL(`${name}?${spec.sha256.slice(0, 16)}`, base);
  const cache = spec.keep && globalThis.caches ? await caches.open(CACHE).catch(() => null) : null;
  const kept = await cache?.match(url);
  let data = kept ? new Uint8Array(await kept.arrayBuffer()) : null;
  if (data) onBytes(data.length);
  else {
    const answer = await fetch(url).catch((e) => { throw new WasatError(`${name} cannot be fetched (${e.message}): is the server gone?`); });
    if (!answer.ok) throw new WasatError(`${name} cannot be fetched: the server says ${answer.status} ${answer.statusText}`);
    data = new Uint8Array(spec.bytes);
    let at = 0;
    for (const reader = answer.body.getReader(); ;) {
      const { done, value: chunk } = await reader.read();
      if (done) break;
      if (at + chunk.length > spec.bytes) throw new WasatError(`${name} is longer than ${spec.bytes} bytes: copy the folder again`);
      data.set(chunk, at);
      at += chunk.length;
      onBytes(chunk.length);
    }
    if (at !== spec.bytes) throw new WasatError(`${name} has ${at} bytes of ${spec.bytes}: copy the folder again`);
  }
  if (globalThis.crypto?.subtle) {
    const hash = Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", data)), (b) => b.toString(16).padStart(2, "0")).join("");
    if (hash !== spec.sha256) {
      await cache?.delete(url);
      throw new WasatError(`${name} is not the file that was exported (its SHA-256 differs): copy the folder again`);
    }
  }
  if (cache && !kept) {
    const old = (await cache.keys()).filter((r) => r.url.split("?")[0] === url.href.split("?")[0]); // of an earlier export
    await Promise.all(old.map((r) => cache.delete(r)));
    await cache.put(url, new Response(data)).catch(() => {}); // no room: it is fetched again next time
  }
  return data;
}

/** The model of a folder. `onProgress(what, done, total)` hears of bytes and kernels. */
export async function load(folder = ".", onProgress = () => {}) {
  const base = new URL(folder.endsWith("/") ? folder : `${folder}/`, globalThis.location?.href ?? import.meta.url);
  const answer = await fetch(new URL("manifest.json", base));
  if (!answer.ok) throw new WasatError(`there is no model here: the server says ${answer.status} to manifest.json`);
  const manifest = await answer.json().catch(() => { throw new WasatError("manifest.json is damaged: copy the folder again"); });
  const { web, files } = manifest;
  if (web?.format !== FORMAT) throw new WasatError(`the model has format ${web?.format}, this page reads ${FORMAT}: export it again`);
  const text = async (name) => new TextDecoder().decode(await file(base, name, files[name]));
  const plan = JSON.parse(await text("plan.json"));
  const device = await Device.open(plan.needs);
  const host = new Host(plan, await text("kernels.wgsl"), device);
  const tokenizer = files["tokenizer.json"] ? new Tokenizer(JSON.parse(await text("tokenizer.json"))) : null;

  const total = web.shards.reduce((sum, name) => sum + files[name].bytes, 0);
  let done = 0;
  const weights = {};
  for (const [i, shard] of web.shards.entries()) {
    const data = await file(base, shard, { ...files[shard], keep: true }, (n) => onProgress("weights", (done += n), total));
    for (const w of web.weights.filter((w) => w.shard === i)) {
      const memory = device.allocate(Math.max(w.bytes, 4));
      if (w.at + w.bytes > data.length) throw new WasatError(`weight ${w.name} lies beyond its file: export the model again`);
      if (w.bytes) device.write(memory, data.subarray(w.at, w.at + w.bytes));
      weights[w.name] = { ...memory, dtype: w.dtype, shape: w.shape };
    }
  }
  await device.gpu.queue.onSubmittedWorkDone();
  if (device.failure || device.lost) throw device.failed("");
  const served = Object.keys(web.entries);
  await host.prepare(served, (n, of) => onProgress("kernels", n, of));
  return new Model({ ...manifest.interface, ...manifest.limits }, web, host, weights, tokenizer);
}

export class Model {
  constructor(facts, web, host, weights, tokenizer) {
    Object.assign(this, { interface: facts, web, host, weights, tokenizer, memory: host.memory });
  }

  get name() { return this.interface.name; }
  get kinds() { return (this.interface.media?.encoders ?? []).map((e) => e.kind); }

  /** Calls an entry without states on { name: { data, shape } }; resolves to its outputs by name. */
  async run(entry, inputs) {
    const e = this.entry(entry);
    const args = e.inputs.map((spec) => {
      const given = inputs[spec.name];
      if (!given) throw new WasatError(`entry ${entry} takes ${spec.name} ${spec.dtype}[${spec.shape}], which is missing`);
      return this.memory.of(given.data, spec.dtype, given.shape);
    });
    this.checkIndices(e, Object.fromEntries(e.inputs.map((spec, i) => [spec.name, { data: inputs[spec.name].data, shape: args[i].shape }])));
    const found = await this.host.call(entry, [...args, ...e.weights.map((w) => this.weights[w])]);
    args.forEach((a) => a.buffer.destroy());
    this.host.recorded.delete(entry); // it names memory that is gone
    return Object.fromEntries(found.map((o) => [o.name, o]));
  }

  entry(name) {
    const found = this.web.entries[name];
    if (!found) throw new WasatError(`the model has no entry ${name}; it has ${Object.keys(this.web.entries).join(", ")}`);
    return found;
  }

  /** Indices that kernels read by must lie in their tables. */
  checkIndices(e, given, known = {}) {
    const symbols = { ...known };
    for (const spec of e.inputs) {
      spec.shape.forEach((d, i) => { if (typeof d === "string" && given[spec.name]) symbols[d] = given[spec.name].shape[i]; });
    }
    for (const { input, low, high, where } of e.indices) {
      if (!given[input]) continue;
      const [from, to] = [value(low, symbols), value(high, symbols)];
      const wrong = Array.prototype.find.call(given[input].data, (x) => !(Number.isInteger(Number(x)) && Number(x) >= from && Number(x) < to));
      if (wrong !== undefined) throw new WasatError(`${where}: index ${wrong} of ${input} is outside ${from} .. ${to - 1}`);
    }
  }

  /** The rows f32[t, dim] that the model's encoder makes of a File or Blob, or of decoded arrays. */
  async embed(medium) {
    const { kind, inputs } = await arraysOf(medium, this.interface.media?.encoders ?? [], this.host.device);
    const { entry } = this.interface.media.encoders.find((e) => e.kind === kind);
    return Object.values(await this.run(entry, inputs))[0];
  }

  /** The probabilities of the classes of a head of pictures, sounds or videos. */
  async classify(head, medium) {
    const spec = this.interface.heads.find((h) => h.name === head);
    if (!spec || spec.of === "text") throw new WasatError(`the model has no head ${head} of media`);
    const { kind, inputs } = await arraysOf(medium, this.interface.media?.encoders ?? [], this.host.device);
    if (kind !== spec.of) throw new WasatError(`head ${head} is of ${spec.of}, and this is ${kind}`);
    const { data } = Object.values(await this.run(spec.entry, inputs))[0];
    const most = data.reduce((a, b) => Math.max(a, b), -Infinity);
    const e = Float64Array.from(data, (x) => Math.exp(x - most));
    const sum = e.reduce((a, b) => a + b, 0);
    return Array.from(e, (x) => x / sum);
  }

  /** Token ids of a prompt (texts and media in any order), and the rows of media that they name. */
  async read(parts) {
    const ids = [];
    const rows = [];
    let next = this.interface.media?.vocab ?? 0;
    for (const part of parts) {
      if (typeof part === "string") ids.push(...this.text().encode(part, false));
      else {
        const found = await this.embed(part);
        for (let r = 0; r < found.shape[0]; r++) ids.push(next++);
        rows.push(found.data);
      }
    }
    const [before, after] = parts.some((p) => typeof p === "string") ? this.text().around() : [[], []];
    const all = [...before, ...ids, ...after];
    if (!all.length) {
      if (this.interface.generation.bos === null) throw new WasatError("the prompt is empty, and the model has no token to begin a text with");
      all.push(this.interface.generation.bos);
    }
    const dim = this.interface.media?.dim ?? 1;
    const media = new Float32Array(rows.reduce((sum, r) => sum + r.length, 0));
    rows.reduce((at, r) => (media.set(r, at), at + r.length), 0);
    return { ids: all, media: { data: media, shape: [media.length / dim, dim] } };
  }

  text() {
    if (!this.tokenizer) throw new WasatError("the model has no tokenizer: give token ids");
    return this.tokenizer;
  }

  /**
   * Continues a prompt: an array of texts and media (Files, Blobs, arrays), or of token ids. Yields { text, token } as text is
   * certain; returns { tokens, finish, promptTokens, prefillSeconds, decodeSeconds }. `options`: maxTokens, signal (an
   * AbortSignal), and those of Sampler.
   */
  async *generate(prompt, { maxTokens = Infinity, signal, ...options } = {}) {
    if (!(maxTokens === Infinity || (Number.isInteger(maxTokens) && maxTokens >= 1))) {
      throw new WasatError(`maxTokens is ${maxTokens}; it must be a whole number, at least 1`);
    }
    const parts = typeof prompt === "string" ? [prompt] : prompt;
    const plain = parts.length > 0 && parts.every((p) => typeof p === "number");
    const { ids, media } = plain ? { ids: parts, media: { data: new Float32Array(0), shape: [0, 1] } } : await this.read(parts);
    const context = this.interface.context ?? Infinity;
    const most = Math.min(maxTokens, context - ids.length);
    if (!(most >= 1)) throw new WasatError(`the prompt has ${ids.length} tokens; the model's context is ${context}: shorten it`);
    if (!Number.isFinite(most)) throw new WasatError("the model states no context limit: give maxTokens");
    const session = new Session(this, ids.length + most);
    const text = ids.filter((t) => t < (this.interface.media?.vocab ?? Infinity));
    const sampler = new Sampler(options, text);
    const stream = this.tokenizer?.stream(text);
    const tokens = [];
    let finish = "length";
    try {
      await session.begin(media, ids);
      const started = performance.now();
      let logits = await session.step(ids);
      const read = performance.now();
      for (;;) {
        const token = sampler.sample(logits);
        if (this.interface.generation.eos.includes(token)) { finish = "eos"; break; }
        tokens.push(token);
        yield { token, text: stream?.push(token) ?? "" };
        if (tokens.length === most) break;
        if (signal?.aborted) { finish = "stopped"; break; }
        logits = await session.step([token]);
      }
      const rest = stream?.flush() ?? "";
      if (rest) yield { token: null, text: rest };
      const seconds = (a, b) => (b - a) / 1000;
      return { tokens, finish, promptTokens: ids.length, prefillSeconds: seconds(started, read), decodeSeconds: seconds(read, performance.now()) };
    } finally {
      session.close();
    }
  }
}

/** Caches for one text, on the GPU. */
export class Session {
  constructor(model, context) {
    const { prefill, decode } = model.web.entries;
    if (!prefill || !decode) throw new WasatError("the model has no entries prefill and decode: it does not write text");
    Object.assign(this, { model, memory: model.memory, limits: model.interface, entries: { prefill, decode } });
    this.past = 0;
    this.capacity = 0;
    this.states = {};
    this.given = {};
    this.most = this.rounded(context);
    this.tokens = this.limits.tokens;
    const along = (spec) => spec.name !== this.tokens && spec.shape.includes(prefill.inputs.find((i) => i.name === this.tokens).shape[1]);
    this.along = prefill.inputs.filter(along);
    const unknown = this.along.find((spec) => !COUNTED.includes(spec.name));
    if (unknown) throw new WasatError(`the model takes ${unknown.name} for each token, which this page cannot give`);
    const own = [this.tokens, "past", "last", ...this.along.map((s) => s.name)];
    this.others = prefill.inputs.filter((i) => !own.includes(i.name));
    this.pastBuffer = this.memory.zeros("int64", [1]);
    this.tokenBuffer = this.memory.zeros("int64", [1, 1]);
  }

  rounded(n) {
    return Math.ceil(n / this.limits.granule) * this.limits.granule;
  }

  /** Room for so many positions; what growing states hold is copied. */
  async reserve(capacity) {
    const { device } = this.model.host;
    const moves = [];
    const old = [];
    for (const s of this.model.web.states) {
      const before = this.states[s.name];
      const grows = s.positions !== null && s.capacity === null;
      if (before && !grows) continue;
      const shape = s.shape.map((d) => value(d, { b: 1, c: capacity }));
      const made = this.memory.zeros(s.dtype, shape);
      if (typeof s.empty === "number" && s.empty !== 0) this.memory.set(made, new Float32Array(count(shape)).fill(s.empty));
      if (typeof s.empty === "string") {
        const first = this.model.weights[s.empty];
        moves.push({ op: "move", from: first, to: made, bytes: Math.min(first.bytes, made.bytes) });
      }
      if (before) {
        const inner = count(shape.slice(s.positions + 1)) * this.memory.width(s.dtype);
        const [was, is] = [before.shape[s.positions] * inner, shape[s.positions] * inner];
        for (let i = 0; i < count(shape.slice(0, s.positions)); i++) {
          moves.push({ op: "move", from: { buffer: before.buffer, at: i * was }, to: { buffer: made.buffer, at: i * is }, bytes: was });
        }
        old.push(before.buffer);
      }
      this.states[s.name] = made;
    }
    this.capacity = capacity;
    if (moves.length) await device.run(device.record(moves), []);
    old.forEach((b) => b.destroy()); // after the submission, which still reads them
  }

  /** Makes room, and gives the model the media that the tokens name. */
  async begin(media, ids) {
    await this.reserve(Math.min(this.rounded(FIRST), this.most));
    const spec = this.limits.media;
    const encoder = this.model.web.entries.encode;
    const named = spec ? [...new Set(ids.filter((t) => t >= spec.vocab).map((t) => t - spec.vocab))] : [];
    const values = spec ? {
      media: media.shape[0] ? media : { data: new Float32Array(spec.dim), shape: [1, spec.dim] },
      seen: { data: named.length ? named : [-1], shape: [1, Math.max(named.length, 1)] },
    } : {};
    if (encoder) {
      const made = await this.model.run("encode", values);
      for (const [name, x] of Object.entries(made)) values[name] = x;
    }
    for (const other of this.others) {
      if (!values[other.name]) throw new WasatError(`the model takes ${other.name} beside tokens, which this page cannot give`);
      this.given[other.name] = { ...this.memory.of(values[other.name].data, other.dtype, values[other.name].shape), data: values[other.name].data };
    }
  }

  /** Appends tokens; resolves to the logits f32[vocab] after the last one. */
  async step(tokens) {
    const chunk = this.limits.chunk ?? Infinity;
    let logits = null;
    for (let at = 0; at < tokens.length; at += chunk) logits = await this.feed(tokens.slice(at, at + chunk));
    return logits;
  }

  async feed(tokens) {
    const n = tokens.length;
    const needed = this.past + n;
    if (needed > this.most) throw new WasatError(`the text has ${needed} tokens, and the session is for ${this.most}`);
    if (needed > this.capacity) await this.reserve(Math.min(this.rounded(Math.max(needed, 2 * this.capacity)), this.most));
    const name = n === 1 ? "decode" : "prefill";
    const e = this.entries[name];
    const temporary = [];
    const fresh = (values, dtype, shape) => (temporary.push(this.memory.of(values, dtype, shape)), temporary.at(-1));
    this.memory.set(this.pastBuffer, [this.past]);
    const args = e.inputs.map((spec) => {
      if (spec.name === this.tokens) {
        if (n > 1) return fresh(tokens, spec.dtype, [1, n]);
        this.memory.set(this.tokenBuffer, tokens);
        return { ...this.tokenBuffer, dtype: spec.dtype };
      }
      if (spec.name === "past") return this.pastBuffer;
      if (spec.name === "last") return fresh([n - 1], spec.dtype, [1]);
      if (this.given[spec.name]) return this.given[spec.name];
      return fresh(tokens.map((_, i) => this.past + i), spec.dtype, spec.shape.length === 1 ? [n] : [1, n]);
    });
    const given = Object.fromEntries(e.inputs.map((spec, i) => [spec.name, { shape: args[i].shape, data: this.given[spec.name]?.data ?? [] }]));
    given[this.tokens].data = tokens;
    this.model.checkIndices(e, given, { c: this.capacity });
    const found = await this.model.host.call(name, [...args, ...e.states.map((s) => this.states[s]), ...e.weights.map((w) => this.model.weights[w])]);
    if (temporary.length) {
      temporary.forEach((t) => t.buffer.destroy());
      this.model.host.recorded.delete(name);
    }
    const cut = found.find((o) => o.name === this.limits.cut);
    if (cut?.data.some((x) => x)) throw new WasatError("what sees each other (a picture, a prefix) is to come in one piece, which is too long here");
    const logits = found.find((o) => o.name === "logits") ?? found.find((o) => o.name !== this.limits.cut);
    this.past += n;
    return logits.data.subarray(logits.data.length - logits.shape.at(-1));
  }

  close() {
    for (const x of [...Object.values(this.states), ...Object.values(this.given), this.pastBuffer, this.tokenBuffer]) x.buffer.destroy();
    ["prefill", "decode"].forEach((name) => this.model.host.recorded.delete(name));
  }
}
