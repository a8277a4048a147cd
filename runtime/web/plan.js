// Runs the entries of a launch plan (docs/targets.md): sizes from the arrays that are given, launches recorded once for the
// same arrays.

import { WasatError, piece } from "./device.js";

const OPERATORS = {
  "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "//": (a, b) => Math.floor(a / b),
  "%": (a, b) => a - b * Math.floor(a / b), min: Math.min, max: Math.max,
};
const RECORDINGS = 2; // kept of an entry, with the memory that they name: a session's decode is one

/** What a size (a number, a symbol or [operator, size, size]) is. */
export function value(tree, symbols) {
  if (typeof tree === "number") return tree;
  if (typeof tree === "string") {
    if (!(tree in symbols)) throw new WasatError(`the size ${tree} is not known`);
    return symbols[tree];
  }
  return OPERATORS[tree[0]](value(tree[1], symbols), value(tree[2], symbols));
}

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int32: Int32Array, uint32: Uint32Array, int16: Int16Array,
  uint16: Uint16Array, int8: Int8Array, uint8: Uint8Array, float16: Uint16Array, bfloat16: Uint16Array,
};
const WIDTHS = { int64: 8, uint64: 8, float64: 8, float32: 4, int32: 4, uint32: 4, int16: 2, uint16: 2, float16: 2, bfloat16: 2 };
const FLOAT = new Float32Array(1);
const BITS = new Uint32Array(FLOAT.buffer);
/** Floats of 16 bits: the bits of a number, rounded to the nearest (of two, the even one) as f32 and then to these; the number
 * that bits are. */
const HALVES = {
  bfloat16: {
    bits(x) {
      FLOAT[0] = x;
      const b = BITS[0];
      return Number.isNaN(FLOAT[0]) ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
    },
    number(h) {
      BITS[0] = h << 16;
      return FLOAT[0];
    },
  },
  float16: {
    bits(x) {
      FLOAT[0] = x;
      const b = BITS[0];
      const sign = (b >>> 16) & 0x8000;
      const size = Math.abs(FLOAT[0]);
      if (Number.isNaN(size)) return sign | 0x7e00;
      if (size >= 65520) return sign | 0x7c00;
      if (size >= 2 ** -14) return sign | (((b & 0x7fffffff) - (112 << 23) + 0xfff + ((b >>> 13) & 1)) >>> 13);
      const steps = size * 2 ** 24; // subnormal
      const low = Math.floor(steps);
      return sign | (low + (steps - low > 0.5 || (steps - low === 0.5 && low % 2)));
    },
    number(h) {
      const [sign, exponent, rest] = [h & 0x8000 ? -1 : 1, (h >>> 10) & 31, h & 1023];
      if (exponent === 31) return rest ? NaN : sign * Infinity;
      return sign * (exponent ? (1024 + rest) * 2 ** (exponent - 25) : rest * 2 ** -24);
    },
  },
};
const padded = (bytes) => Math.max(Math.ceil(bytes / 4) * 4, 4);
export const count = (shape) => shape.reduce((a, b) => a * b, 1);

/** Memory of a device, as the plan stores elements. */
export class Memory {
  constructor(device, storage) {
    this.device = device;
    this.storage = storage;
  }

  width(dtype) {
    return WIDTHS[this.storage[dtype] ?? dtype] ?? 1;
  }

  zeros(dtype, shape) {
    return { ...this.device.allocate(padded(this.width(dtype) * count(shape))), dtype, shape };
  }

  /** A buffer with the numbers of an array (or any list), as `dtype`. */
  of(values, dtype, shape) {
    const buffer = this.zeros(dtype, shape);
    this.set(buffer, values);
    return buffer;
  }

  set(buffer, values) {
    const Made = ARRAYS[this.storage[buffer.dtype] ?? buffer.dtype];
    if (!Made) throw new WasatError(`arrays of ${buffer.dtype} cannot be given to this device`);
    const data = new Uint8Array(padded(values.length * Made.BYTES_PER_ELEMENT));
    const half = HALVES[buffer.dtype];
    new Made(data.buffer, 0, values.length).set(half ? Array.from(values, (x) => half.bits(Number(x))) : values);
    this.device.write(buffer, data);
  }

  /** The elements that bytes from the device are; floats of 16 bits as Float32Array. */
  loaded(bytes, dtype, n) {
    const Made = ARRAYS[this.storage[dtype] ?? dtype];
    const own = new Made(bytes.slice(0, n * Made.BYTES_PER_ELEMENT).buffer);
    return HALVES[dtype] ? Float32Array.from(own, HALVES[dtype].number) : own;
  }
}

/** The entries of a plan, on a device. */
export class Host {
  constructor(plan, source, device) {
    this.plan = plan;
    this.source = source;
    this.device = device;
    this.memory = new Memory(device, plan.storage);
    this.kernels = new Map();
    this.constants = new Map();
    this.scratch = []; // shared by all entries, of which one runs at a time
    this.recorded = new Map();
    this.last = Promise.resolve();
    this.ids = new WeakMap();
  }

  /** Compiles all kernels of some entries, so that no first call waits for them one by one. */
  async prepare(entries, onProgress = () => {}) {
    const names = new Set();
    const walk = (steps) => steps.forEach((s) => {
      if (s.op === "launch") names.add(s.kernel);
      [s.steps, s.then, s.otherwise].forEach((inner) => inner && walk(inner));
    });
    entries.forEach((e) => walk(this.plan.entries[e].steps));
    let done = 0;
    await Promise.all([...names].map(async (name) => {
      if (!this.kernels.has(name)) {
        const spec = this.plan.kernels[name];
        this.kernels.set(name, await this.device.kernel({ ...spec, name, source: this.source.slice(...spec.at) }));
      }
      onProgress(++done, names.size);
    }));
  }

  /** Calls `entry` with buffers: inputs, states, weights, after the calls before it, with which it shares memory. Resolves to
   * its outputs: { name, dtype, shape, data }. */
  call(entry, args) {
    const made = this.last.then(() => this.called(entry, args));
    this.last = made.catch(() => {});
    return made;
  }

  async called(entry, args) {
    await this.prepare([entry]);
    const known = this.recorded.get(entry) ?? new Map();
    this.recorded.set(entry, known);
    const key = args.map((a) => `${this.id(a.buffer)}:${a.at}:${a.shape}`).join();
    let made = known.get(key);
    if (made) known.delete(key); // the last one used is the last to go
    else {
      while (known.size >= RECORDINGS) known.delete(known.keys().next().value);
      made = this.record(entry, args);
    }
    known.set(key, made);
    const found = await this.device.run(made.commands, made.outputs.map((o) => o.piece));
    return made.outputs.map((o, i) => ({
      name: o.name, dtype: o.dtype, shape: o.shape, data: this.memory.loaded(found[i], o.dtype, count(o.shape)),
    }));
  }

  id(buffer) {
    if (!this.ids.has(buffer)) this.ids.set(buffer, (this.next = (this.next ?? 0) + 1));
    return this.ids.get(buffer);
  }

  record(entry, args) {
    const e = this.plan.entries[entry];
    const symbols = Object.fromEntries(e.symbols.map((s) => [s.name, args[s.array].shape[s.axis]]));
    let taken = 0;
    const pieces = e.arrays.map((a, i) => {
      const bytes = padded(value(a.bytes, symbols));
      if (a.kind === "scratch") return this.shared(taken++, bytes);
      if (a.kind === "constant") return this.constant(a.number);
      const want = a.shape.map((d) => value(d, symbols));
      if (`${want}` !== `${args[i].shape}`) {
        throw new WasatError(`${entry}: ${a.name} has shape [${args[i].shape}]; beside the others it must be [${want}]`);
      }
      return piece(args[i].buffer, args[i].at, bytes);
    });
    const commands = this.commands(entry, e.steps, pieces, symbols);
    const outputs = e.outputs.map((o) => ({
      name: o.name, dtype: o.dtype, shape: o.shape.map((d) => value(d, symbols)),
      piece: piece(pieces[o.array].buffer, pieces[o.array].at, padded(value(o.bytes, symbols))),
    }));
    return { commands: this.device.record(commands), outputs };
  }

  commands(entry, steps, pieces, symbols) {
    return steps.flatMap((s) => {
      switch (s.op) {
        case "launch": {
          const grid = s.grid.map((d) => value(d, symbols));
          if (Math.min(...grid) <= 0) return [];
          const scalars = s.scalars.map((d) => value(d, symbols));
          const largest = Math.max(...scalars.map(Math.abs), grid[0]);
          if (largest > 2 ** 31 - 1) throw new WasatError(`${entry}: a size is ${largest}; this device counts to 2147483647: give it less at a time`);
          return [{ op: "launch", name: s.kernel, kernel: this.kernels.get(s.kernel), grid, scalars, pieces: s.arrays.map((i) => pieces[i]) }];
        }
        case "copy": {
          const bytes = value(s.bytes, symbols);
          return bytes ? [{ op: "move", from: pieces[s.from], to: pieces[s.to], bytes }] : [];
        }
        case "check": {
          const [left, right] = [value(s.left, symbols), value(s.right, symbols)];
          if (left !== right) throw new WasatError(`${s.where}: needs ${s.needs}, and these are ${left} and ${right}`);
          return [];
        }
        case "loop":
          return Array.from({ length: value(s.count, symbols) }, (_, turn) =>
            this.commands(entry, s.steps, pieces, { ...symbols, [s.symbol]: turn })).flat();
        case "if":
          return [{
            op: "choice", condition: piece(pieces[s.condition].buffer, pieces[s.condition].at, 4),
            then: this.commands(entry, s.then, pieces, symbols), otherwise: this.commands(entry, s.otherwise, pieces, symbols),
          }];
        default:
          throw new WasatError(`the plan has a step ${s.op} that this page does not know: export the model again`);
      }
    });
  }

  shared(number, bytes) {
    if (!this.scratch[number] || this.scratch[number].bytes < bytes) this.scratch[number] = this.device.allocate(bytes);
    return piece(this.scratch[number].buffer, 0, bytes);
  }

  constant(number) {
    if (!this.constants.has(number)) {
      const { dtype, data } = this.plan.constants[number];
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
      const Made = { int64: BigInt64Array, uint64: BigUint64Array, bool: Uint8Array, ...ARRAYS }[dtype];
      const values = Array.from(new Made(bytes.buffer), Number);
      this.constants.set(number, this.memory.of(values, dtype, [values.length]));
    }
    return this.constants.get(number);
  }
}
