// From logits to a token: the filters, in the order and with the definitions of wasat.runtime.sampling, and its random numbers.

import { WasatError } from "./device.js";

const MASK64 = (1n << 64n) - 1n;
const MASK128 = (1n << 128n) - 1n;

/** NumPy's default_rng([seed, row]): SeedSequence (O'Neill's seed_seq_fe) and PCG64 XSL-RR. */
export class Random {
  constructor(seed, row) {
    const words = [seed, row].flatMap((n) => {
      const out = [];
      for (let x = BigInt(n); x > 0n || !out.length; x >>= 32n) out.push(Number(x & 0xffffffffn));
      return out;
    });
    let hash = 0x43b0d7e5;
    const mixed = (value) => {
      value = (value ^ hash) >>> 0;
      hash = Math.imul(hash, 0x931e8875) >>> 0;
      value = Math.imul(value, hash) >>> 0;
      return (value ^ (value >>> 16)) >>> 0;
    };
    const mix = (x, y) => {
      const r = (Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715)) >>> 0;
      return (r ^ (r >>> 16)) >>> 0;
    };
    const pool = [0, 1, 2, 3].map((i) => mixed(words[i] ?? 0));
    for (let s = 0; s < 4; s++) for (let d = 0; d < 4; d++) if (s !== d) pool[d] = mix(pool[d], mixed(pool[s]));
    for (let s = 4; s < words.length; s++) for (let d = 0; d < 4; d++) pool[d] = mix(pool[d], mixed(words[s]));
    let other = 0x8b51f9dd;
    const state = Array.from({ length: 8 }, (_, i) => {
      let value = (pool[i % 4] ^ other) >>> 0;
      other = Math.imul(other, 0x58f38ded) >>> 0;
      value = Math.imul(value, other) >>> 0;
      return BigInt((value ^ (value >>> 16)) >>> 0);
    });
    const [a, b, c, d] = [0, 1, 2, 3].map((i) => state[2 * i] | (state[2 * i + 1] << 32n));
    this.step = (((c << 64n) | d) << 1n | 1n) & MASK128;
    this.state = 0n;
    this.advance();
    this.state = (this.state + ((a << 64n) | b)) & MASK128;
    this.advance();
  }

  advance() {
    this.state = (this.state * 0x2360ed051fc65da44385df649fccf645n + this.step) & MASK128;
  }

  /** The next number in [0, 1). */
  next() {
    this.advance();
    const x = ((this.state >> 64n) ^ this.state) & MASK64;
    const by = this.state >> 122n;
    const turned = ((x >> by) | (x << ((64n - by) & 63n))) & MASK64;
    return Number(turned >> 11n) / 2 ** 53;
  }
}

/** Chooses the tokens of one text. */
export class Sampler {
  constructor(options = {}, prompt = []) {
    this.options = { temperature: 0, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, seed: 0, ...options };
    const o = this.options;
    const bad = (name, want) => { throw new WasatError(`${name} is ${o[name]}; it must be ${want}`); };
    if (!(o.temperature >= 0 && Number.isFinite(o.temperature))) bad("temperature", "a finite number, 0 or above");
    if (!(Number.isInteger(o.topK) && o.topK >= 0)) bad("topK", "a whole number, 0 or above");
    if (!(o.topP > 0 && o.topP <= 1)) bad("topP", "a number above 0 and at most 1");
    if (!(o.minP >= 0 && o.minP <= 1)) bad("minP", "a number from 0 to 1");
    if (!(o.repetitionPenalty > 0 && Number.isFinite(o.repetitionPenalty))) bad("repetitionPenalty", "a finite number above 0");
    if (!(Number.isSafeInteger(o.seed) && o.seed >= 0)) bad("seed", "a whole number, 0 or above");
    this.random = new Random(o.seed, 0);
    this.seen = new Set(prompt);
  }

  /** The next token for logits f32[vocab]. */
  sample(logits) {
    const o = this.options;
    if (o.repetitionPenalty !== 1) {
      logits = Float32Array.from(logits);
      for (const t of this.seen) logits[t] = logits[t] > 0 ? logits[t] / o.repetitionPenalty : logits[t] * o.repetitionPenalty;
    }
    let token = 0;
    for (let i = 0; i < logits.length; i++) {
      if (Number.isNaN(logits[i])) throw new WasatError("the model returned NaN among its logits; its weights or inputs are damaged");
      if (logits[i] > logits[token]) token = i;
    }
    if (!Number.isFinite(logits[token])) throw new WasatError(`the model returned ${logits[token]} among its logits; its weights or inputs are damaged`);
    if (o.temperature > 0) {
      const { ids, p } = candidates(logits, o);
      let total = 0;
      const cumulative = p.map((x) => (total += x));
      const draw = this.random.next() * total;
      const at = cumulative.findIndex((c) => c > draw);
      token = ids[at < 0 ? ids.length - 1 : at];
    }
    this.seen.add(token);
    return token;
  }
}

function candidates(logits, o) {
  let ids = Array.from(logits.keys());
  if (o.topK > 0 && o.topK < logits.length) {
    const least = Float32Array.from(logits).sort()[logits.length - o.topK];
    ids = ids.filter((i) => logits[i] >= least);
  }
  const peak = ids.reduce((m, i) => Math.max(m, logits[i]), -Infinity);
  let p = ids.map((i) => Math.exp((logits[i] - peak) / o.temperature));
  const scaled = () => { const sum = p.reduce((a, b) => a + b, 0); p = p.map((x) => x / sum); };
  const keep = (test) => {
    const kept = p.map(test);
    ids = ids.filter((_, i) => kept[i]);
    p = p.filter((_, i) => kept[i]);
  };
  scaled();
  if (o.topP < 1) { // of equal ones the lower index goes first
    const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a] || a - b);
    const kept = new Set();
    let sum = 0;
    for (const i of order) {
      kept.add(i);
      if ((sum += p[i]) >= o.topP) break;
    }
    keep((_, i) => kept.has(i));
  }
  if (o.minP > 0) {
    const most = p.reduce((a, b) => Math.max(a, b), 0);
    keep((x) => x >= o.minP * most);
  }
  scaled();
  return { ids, p };
}
