// Decode and prefill in one page: our host, and onnxruntime-web on our exported ONNX files, whose KV caches stay where it computes.
// Each contender writes greedy tokens through the same interface: tokens in, logits read back, the next token chosen here.

import * as ort from "./ort/ort.webgpu.min.mjs";
import { Session, load } from "./model/model.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.logLevel = "fatal";

const greedy = (logits) => logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0);

/** Ours. */
export async function ours() {
  const model = await load("./model");
  let session = null;
  return {
    async begin(ids, context) {
      session?.close();
      session = new Session(model, context);
      await session.begin({ data: new Float32Array(0), shape: [0, 1] }, ids);
    },
    step: (tokens) => session.step(tokens),
    adapter: model.host.device.name,
    launches: Object.fromEntries(["prefill", "decode"].map((e) => [e, model.host.plan.entries[e].steps.length])),
  };
}

/** onnxruntime-web on the files `prefill` and `decode`; `inputs` has their types and sizes. */
export async function theirs(provider, files, inputs) {
  const caches = Object.keys(inputs.decode).filter((n) => n.startsWith("cache."));
  const place = provider === "webgpu" ? "gpu-buffer" : "cpu";
  const sessions = {};
  for (const entry of ["prefill", "decode"]) {
    sessions[entry] = await ort.InferenceSession.create(files[entry], {
      executionProviders: [provider], graphOptimizationLevel: "all",
      preferredOutputLocation: { logits: "cpu", ...Object.fromEntries(caches.map((n) => [`${n}_out`, place])) },
    });
  }
  const made = ({ dtype, shape }, values) => {
    const n = shape.reduce((a, b) => a * b, 1);
    if (dtype === "int64") return new ort.Tensor("int64", BigInt64Array.from(values ?? new Array(n).fill(-1), BigInt), shape);
    return new ort.Tensor(dtype, values ?? (dtype === "bool" ? new Uint8Array(n) : new Float32Array(n)), shape);
  };
  let states = {};
  let past = 0;
  return {
    async begin() {
      Object.values(states).forEach((t) => t.dispose());
      states = Object.fromEntries(caches.map((n) => [n, made(inputs.decode[n])]));
      past = 0;
    },
    async step(tokens) {
      const entry = tokens.length === 1 ? "decode" : "prefill";
      const n = tokens.length;
      const known = { tokens: [[1, n], tokens], past: [[1], [past]], last: [[1], [n - 1]] };
      const feeds = {};
      for (const [name, spec] of Object.entries(inputs[entry])) {
        if (name in known) feeds[name] = made({ ...spec, shape: known[name][0] }, known[name][1]);
        else feeds[name] = states[name] ?? made(spec);
      }
      const found = await sessions[entry].run(feeds);
      Object.values(states).forEach((t) => t.dispose());
      states = Object.fromEntries(caches.map((c) => [c, found[`${c}_out`]]));
      past += n;
      return found.logits.data;
    },
  };
}

/** One turn: seconds of prefill and of decode, and the tokens. */
export async function turn(contender, ids, count, context) {
  await contender.begin(ids, context);
  const started = performance.now();
  let logits = await contender.step(ids);
  const read = performance.now();
  const tokens = [];
  for (let i = 0; i < count; i++) {
    tokens.push(greedy(logits));
    logits = await contender.step([tokens.at(-1)]);
  }
  return { prefill: (read - started) / 1000, decode: (performance.now() - read) / 1000, tokens };
}
