// The page: a prompt of text, files, camera and microphone; what the model writes, as it writes it.

import { WasatError, load } from "./model.js";

const $ = (id) => document.getElementById(id);
const attached = []; // { file, element }
let stopping = null;

const said = (e) => (e instanceof WasatError ? e.message : `${e.name}: ${e.message}`);

function fail(e) {
  $("loading").hidden = true;
  $("failed").hidden = false;
  $("failed").textContent = said(e);
}

const WHAT = { weights: (done, total) => `Loading weights: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`, kernels: (done, total) => `Compiling kernels: ${done} of ${total}` };

async function start() {
  const model = await load(".", (what, done, total) => {
    $("stage").textContent = WHAT[what](done, total);
    $("progress").value = total ? done / total : 1;
  });
  globalThis.wasat = model; // for the console
  $("loading").hidden = true;
  document.querySelector("main").hidden = false;
  $("name").textContent = document.title = model.name;
  $("about").textContent = `Takes ${["text", ...model.kinds].join(", ")}. It runs in this page, on ${model.host.device.name}; nothing leaves this machine.`;
  $("file").accept = model.kinds.map((k) => `${k}/*`).join();
  document.querySelector("label.button").hidden = !model.kinds.length;
  const devices = Boolean(navigator.mediaDevices?.getUserMedia);
  $("camera").hidden = !(devices && model.kinds.includes("image"));
  $("microphone").hidden = !(devices && model.kinds.includes("audio") && globalThis.MediaRecorder);
  listen(model);
}

function attach(file) {
  const figure = document.createElement("figure");
  figure.append(shown(file));
  const remove = document.createElement("button");
  Object.assign(remove, { type: "button", textContent: "×", title: "Remove", onclick: () => {
    attached.splice(attached.findIndex((a) => a.figure === figure), 1);
    figure.remove();
  } });
  figure.append(remove);
  attached.push({ file, figure });
  $("media").append(figure);
}

function shown(file) {
  const kind = file.type.split("/")[0];
  const element = document.createElement({ image: "img", video: "video", audio: "audio" }[kind] ?? "span");
  if (element instanceof HTMLSpanElement) element.textContent = file.name;
  else Object.assign(element, { src: URL.createObjectURL(file), title: file.name, controls: kind !== "image" });
  return element;
}

async function answer(model) {
  const text = $("prompt").value;
  const files = attached.splice(0).map((a) => a.file);
  $("media").replaceChildren();
  if (!text && !files.length) return;
  const turn = document.createElement("article");
  turn.className = "turn";
  const [asked, written, speed] = ["asked", "said", "dim"].map((name) => Object.assign(document.createElement("div"), { className: name }));
  asked.append(...files.map(shown), text);
  turn.append(asked, written, speed);
  $("log").append(turn);
  stopping = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  try {
    const options = Object.fromEntries(["temperature", "topK", "topP", "minP", "seed", "maxTokens"].map((k) => [k, Number($(k).value)]));
    const out = model.generate([...files, ...(text ? [text] : [])], { ...options, signal: stopping.signal });
    for (;;) {
      const { done, value } = await out.next();
      if (done) {
        const rate = (n, s) => (s > 0 ? ` (${(n / s).toFixed(1)}/s)` : "");
        const n = value.tokens.length;
        speed.textContent = `${value.promptTokens} prompt tokens in ${value.prefillSeconds.toFixed(2)} s, ${n} tokens in ${value.decodeSeconds.toFixed(2)} s${rate(Math.max(n - 1, 0), value.decodeSeconds)}, finished by ${value.finish}`;
        turn.dataset.tokens = value.tokens.join();
        break;
      }
      written.append(value.text);
    }
    if ($("prompt").value === text) $("prompt").value = ""; // else the next one is being written
  } catch (e) {
    written.classList.add("error");
    written.append(said(e));
  } finally {
    turn.dataset.done = "yes";
    $("send").disabled = false;
    $("stop").hidden = true;
  }
}

async function photograph() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: true });
  const video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
  await video.play();
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  stream.getTracks().forEach((t) => t.stop());
  canvas.toBlob((blob) => attach(new File([blob], "camera.png", { type: "image/png" })), "image/png");
}

let recorder = null;
async function record() {
  if (recorder) return recorder.stop();
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = (e) => parts.push(e.data);
  recorder.onstop = () => {
    stream.getTracks().forEach((t) => t.stop());
    attach(new File(parts, "microphone", { type: recorder.mimeType.split(";")[0] }));
    recorder = null;
    $("microphone").textContent = "Microphone";
  };
  recorder.start();
  $("microphone").textContent = "Stop recording";
}

function listen(model) {
  const guarded = (f) => () => f().catch((e) => alert(said(e)));
  $("ask").onsubmit = (e) => { e.preventDefault(); if (!$("send").disabled) answer(model); }; // one at a time
  $("prompt").onkeydown = (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) $("ask").requestSubmit(); };
  $("stop").onclick = () => stopping.abort();
  $("file").onchange = () => { [...$("file").files].forEach(attach); $("file").value = ""; };
  $("camera").onclick = guarded(photograph);
  $("microphone").onclick = guarded(record);
  document.ondragover = (e) => { e.preventDefault(); $("ask").classList.add("over"); };
  document.ondragleave = () => $("ask").classList.remove("over");
  document.ondrop = (e) => { e.preventDefault(); $("ask").classList.remove("over"); [...e.dataTransfer.files].forEach(attach); };
}

start().catch(fail);
