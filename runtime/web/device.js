// A WebGPU device: memory, kernels, and lists of launches that are handed over in one piece.

/** What a person should read: what is missing, and what to do. */
export class WasatError extends Error {}

const SPREAD = 65535; // workgroups along one axis; more are spread over the third one, which the kernels know

/** A piece of a GPU buffer: { buffer, at, bytes }. */
export function piece(buffer, at, bytes) {
  return { buffer, at, bytes };
}

export class Device {
  /** The browser's GPU, with what a plan needs. Throws WasatError, saying what is missing. */
  static async open(needs) {
    if (!globalThis.navigator?.gpu) {
      const secure = globalThis.isSecureContext === false ? " over https, or from localhost," : "";
      throw new WasatError(
        `this browser has no WebGPU: open the page${secure} in a recent Chrome, Edge, Safari or Firefox, ` +
        "on a machine whose graphics driver it accepts");
    }
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) throw new WasatError("the browser knows WebGPU and found no GPU that it accepts: see chrome://gpu for why");
    if (needs.f16 && !adapter.features.has("shader-f16")) {
      throw new WasatError("this GPU lacks f16 (shader-f16), which the model uses: export it with the target webgpu");
    }
    const wanted = {
      maxStorageBuffersPerShaderStage: [needs.buffers, "arrays of a kernel"],
      maxComputeInvocationsPerWorkgroup: [needs.threads, "threads of a workgroup"],
      maxComputeWorkgroupStorageSize: [needs.shared, "bytes of a workgroup"],
    };
    for (const [limit, [need, what]] of Object.entries(wanted)) {
      if (adapter.limits[limit] < need) throw new WasatError(`this GPU has ${adapter.limits[limit]} ${what}; the model needs ${need}`);
    }
    const names = [...Object.keys(wanted), "maxStorageBufferBindingSize", "maxBufferSize", "maxComputeWorkgroupSizeX"];
    const device = await adapter.requestDevice({
      requiredFeatures: needs.f16 ? ["shader-f16"] : [],
      requiredLimits: Object.fromEntries(names.map((n) => [n, adapter.limits[n]])),
    });
    return new Device(device, adapter.info?.description || adapter.info?.vendor || "the GPU");
  }

  constructor(gpu, name) {
    this.gpu = gpu;
    this.name = name;
    this.uniform = gpu.limits.minUniformBufferOffsetAlignment;
    this.largest = Math.min(gpu.limits.maxStorageBufferBindingSize, gpu.limits.maxBufferSize);
    this.staging = null;
    this.lost = null;
    gpu.lost.then((info) => { this.lost = info.message || info.reason; });
    gpu.onuncapturederror = (e) => { this.failure ??= e.error.message; };
    this.failure = null;
  }

  /** Zeroed memory. */
  allocate(bytes) {
    if (bytes > this.largest) {
      throw new WasatError(`${this.name} has at most ${this.largest} bytes in one array, and one of ${bytes} is asked for: too little memory`);
    }
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    return piece(this.gpu.createBuffer({ size: bytes, usage }), 0, bytes);
  }

  /** Writes a typed array whose bytes are a multiple of 4. */
  write(to, data) {
    this.gpu.queue.writeBuffer(to.buffer, to.at, data.buffer, data.byteOffset, data.byteLength);
  }

  async kernel(spec) {
    const stage = GPUShaderStage.COMPUTE;
    const kinds = [...spec.writes.map((w) => (w ? "storage" : "read-only-storage")), "uniform"];
    const layout = this.gpu.createBindGroupLayout({
      entries: kinds.map((type, binding) => ({ binding, visibility: stage, buffer: { type } })),
    });
    const module = this.gpu.createShaderModule({ code: spec.source });
    const pipeline = await this.gpu.createComputePipelineAsync({
      layout: this.gpu.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module, entryPoint: spec.name },
    }).catch((e) => { throw new WasatError(`${this.name} does not take the kernel ${spec.name}: ${e.message}`); });
    return { pipeline, layout };
  }

  /** Commands made ready to be run more than once: bind groups, and the numbers of all launches in one array. */
  record(commands) {
    const launches = commands.filter((c) => c.op === "launch");
    const sizes = launches.map((c) => 16 * Math.ceil((c.scalars.length + 1) / 4));
    const starts = [];
    let total = 0;
    for (const size of sizes) {
      starts.push(total);
      total += Math.ceil(size / this.uniform) * this.uniform;
    }
    const numbers = new ArrayBuffer(Math.max(total, 16));
    launches.forEach((c, i) => {
      const own = new Int32Array(numbers, starts[i], sizes[i] / 4);
      own.set(c.scalars);
      own[c.scalars.length] = c.grid[0] - 1;
    });
    const memory = this.gpu.createBuffer({ size: numbers.byteLength, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
    this.gpu.queue.writeBuffer(memory, 0, numbers);
    let at = 0;
    return commands.map((c) => {
      if (c.op === "choice") return { ...c, then: this.record(c.then), otherwise: this.record(c.otherwise) };
      if (c.op !== "launch") return c;
      const parts = [...c.pieces.map((p) => [p.buffer, p.at, p.bytes]), [memory, starts[at], sizes[at]]];
      at += 1;
      const entries = parts.map(([buffer, offset, size], binding) => ({ binding, resource: { buffer, offset, size } }));
      const group = this.gpu.createBindGroup({ layout: c.kernel.layout, entries });
      return { op: "launch", pipeline: c.kernel.pipeline, group, grid: spread(c) };
    });
  }

  /** Runs what was recorded, in one submission; resolves to what the pieces `results` hold afterwards, as bytes. */
  async run(recorded, results) {
    let encoder = this.gpu.createCommandEncoder();
    const encode = async (commands) => {
      let pass = null;
      const end = () => { pass?.end(); pass = null; };
      for (const c of commands) {
        if (c.op === "launch") {
          pass ??= encoder.beginComputePass();
          pass.setPipeline(c.pipeline);
          pass.setBindGroup(0, c.group);
          pass.dispatchWorkgroups(...c.grid);
        } else if (c.op === "move") {
          end();
          encoder.copyBufferToBuffer(c.from.buffer, c.from.at, c.to.buffer, c.to.at, c.bytes);
        } else { // what comes next depends on a number in memory
          end();
          this.gpu.queue.submit([encoder.finish()]);
          const [bytes] = await this.run([], [c.condition]);
          encoder = this.gpu.createCommandEncoder();
          await encode(bytes.some((x) => x) ? c.then : c.otherwise);
        }
      }
      end();
    };
    await encode(recorded);
    const total = results.reduce((sum, p) => sum + p.bytes, 0);
    if (total && (this.staging?.size ?? 0) < total) {
      this.staging?.destroy();
      this.staging = this.gpu.createBuffer({ size: total, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    }
    let at = 0;
    for (const p of results) {
      encoder.copyBufferToBuffer(p.buffer, p.at, this.staging, at, p.bytes);
      at += p.bytes;
    }
    this.gpu.queue.submit([encoder.finish()]);
    if (!total) return [];
    await this.staging.mapAsync(GPUMapMode.READ, 0, total).catch((e) => { throw this.failed(e.message); });
    const bytes = new Uint8Array(this.staging.getMappedRange(0, total).slice(0));
    this.staging.unmap();
    if (this.failure || this.lost) throw this.failed("");
    at = 0;
    return results.map((p) => bytes.subarray(at, (at += p.bytes)));
  }

  failed(message) {
    return new WasatError(`${this.name} failed: ${this.lost ?? this.failure ?? message} (too little memory is the usual reason)`);
  }
}

function spread(c) {
  let [x, y, z] = c.grid;
  if (x > SPREAD && z === 1) {
    z = Math.ceil(x / SPREAD);
    x = Math.ceil(x / z);
  }
  if (Math.max(x, y, z) > SPREAD) {
    throw new WasatError(`${c.name} has ${c.grid} workgroups, which this device cannot count: give it less at a time`);
  }
  return [x, y, z];
}
