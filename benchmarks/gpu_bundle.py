"""A folder that a GPU machine without Wasat, TVM or a network can run: what is compiled here, and what must come out there.

    python benchmarks/gpu_bundle.py out/gpu-bundle                       # sm_80 and sm_90
    python benchmarks/gpu_bundle.py out/small --target opencl --small    # the same in little, for this machine

In it: the runtime's Python files, ``gpu_check.py`` beside this file (which says how to run it), every sample of every operation
with the interpreter's results, decoders of every precision with their logits, the Gemini-style model with its answers, and
models of published shapes without their weights, which are made there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from wasat.backends.tvm.build import plan
from wasat.backends.tvm.ops.low_precision import carried
from wasat.backends.tvm.targets import Target, target_named
from wasat.frontend.huggingface import from_config
from wasat.ir import OPS, ArrayParam, Program, evaluate, parse_program, type_of

import wasat as ws
from wasat.manifest import manifest_of

ROOT = Path(__file__).parents[1]
MOST = 60 << 20
"""Bytes of the archive."""
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
TINY = {
    **LLAMA, "vocab_size": 320, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "270m": {
        **LLAMA, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "1b": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "8b": {
        **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
PRECISIONS = ("f16", "bf16", "int8", "int4")
LENGTHS = {"prefill": [128, 512], "decode": 64}
TOGETHER = 16
"""Operations whose kernels are one file: the compiler reads its headers once for each."""
FEW = ("add", "softmax", "cast", "scan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="cuda:sm_80,sm_90")
    parser.add_argument("--small", action="store_true", help="a few operations and small models")
    args = parser.parse_args()
    bundle(args.out, args.target, args.small)


def bundle(out: Path, target: str, small: bool = False) -> Path:
    """Writes the folder, and its archive beside it, whose path is returned."""
    machine = target_named(target)
    if missing := machine.missing_tools():
        raise SystemExit(f"compiling for {target} needs {missing[0]}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(
        ROOT / "runtime", out / "wasat_runtime", ignore=lambda folder, names: {n for n in names if _left(Path(folder) / n)}
    )
    (out / "wasat").mkdir()
    shutil.copy(ROOT / "wasat" / "errors.py", out / "wasat")  # the root of its errors
    shutil.copy(ROOT / "benchmarks" / "gpu_check.py", out)
    names = FEW if small else sorted(OPS)
    for i in range(0, len(names), TOGETHER):
        operations(out / "operations" / names[i], names[i : i + TOGETHER], machine)
    for precision in ("int4",) if small else (None, *PRECISIONS):
        decoder(out / "decoders" / (precision or "f32"), precision, target)
    if not small:
        demo(out / "demo", target)
    products(out / "products", machine, 64 if small else 4096)
    for shape, config in {"tiny": TINY}.items() if small else SHAPES.items():
        for precision in ("int4",) if small else PRECISIONS:
            model(out / "models" / f"{shape}-{precision}", config, precision, machine)
    (out / "lengths.json").write_text(json.dumps({"prefill": [4, 8], "decode": 6} if small else LENGTHS))
    archive = out.with_suffix(".tar.xz")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(out, out.name)
    size = archive.stat().st_size
    print(f"{archive}: {size / 2**20:.1f} MiB")
    if size > MOST:
        raise SystemExit(f"that is more than {MOST / 2**20:.0f} MiB")
    return archive


def _left(path: Path) -> bool:
    return path.name in ("web", "c", "__pycache__") or (path.is_file() and path.suffix != ".py")


# -- operations ---------------------------------------------------------------------------------------------------------------
def operations(out: Path, names: Sequence[str], machine: Target) -> None:
    """All samples of operations, what they are given and what the reference returns."""
    sys.path.insert(0, str(ROOT / "tests" / "backends"))
    from test_tvm_ops import NOT_COMPILED, _graph

    cases = [
        _graph(f"{n}_{i}", OPS[n], s) for n in names if n not in NOT_COMPILED for i, s in enumerate(OPS[n].samples())
    ]
    params = {k: ArrayParam(x, type_of(x)) for _, _, ps in cases for k, x in ps.items()}
    program = Program({g.name: g for g, _, _ in cases}, dict(params))
    made = plan(program, machine)
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}

    def keep(key: str, x: Any, dtype: str = "") -> dict[str, str]:
        held = carried(np.asarray(x))
        dtype = dtype or held.dtype.name
        arrays[key] = held.view(f"u{held.dtype.itemsize}") if held.dtype.kind == "V" else held
        return {"key": key, "dtype": dtype}

    packed = {a.name: (a, x) for (n, layout), of in made.plan.layouts.items()
              for a, x in zip(of, layout.pack(program.load(n)), strict=True)}  # fmt: skip
    for g, feeds, ps in cases:
        about[g.name] = {
            "graph": str(g),
            "inputs": [keep(f"{g.name}.in{i}", feeds[v.name]) for i, v in enumerate(g.inputs)],
            "weights": [keep(f"{g.name}.w{i}", packed[a.name][1], a.dtype) for i, a in enumerate(made.plan.of(g.name))],
            "outputs": [keep(f"{g.name}.out{i}", x) for i, x in enumerate(evaluate(g, feeds, ps))],
        }  # fmt: skip
    out.mkdir(parents=True)
    for file, write in made.files().items():
        write(out / file)
    np.savez_compressed(out / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (out / "about.json").write_text(json.dumps({"kind": machine.config["kind"], "entries": about}))


# -- models -------------------------------------------------------------------------------------------------------------------
def decoder(out: Path, precision: str | None, target: str) -> None:
    """A small model with its weights, and the logits of each position, as the interpreter computes them, with what each may
    differ by."""
    sys.path.insert(0, str(ROOT / "tests"))
    from rounding import bound, spread

    program = _program(out, TINY)
    rng = np.random.default_rng(3)
    for name, p in program.params.items():
        x = (0.05 * rng.standard_normal(p.type.concrete({}))).astype(np.float32)  # type: ignore[union-attr]
        program.params[name] = ArrayParam(x + ("norm" in name), p.type)
    options: dict[str, Any] = {"quantize": precision, "activation": _half(precision)}
    ws.compile(program, out, target=target, **options)
    tokens = rng.integers(3, 320, (1, 24))
    whole, _ = ws.optimize(program, kv_cache=False, **options)
    logits = ws.run(whole, tokens=tokens)["logits"]
    [far] = spread(whole["forward"], {"tokens": tokens}, {k: whole.load(k) for k in whole.params})
    np.savez(out.with_suffix(".npz"), tokens=tokens, logits=logits, allowed=bound(logits, far))


def _half(precision: str | None) -> str | None:
    """The activations beside weights of a precision: what tensor cores take."""
    return None if precision is None else "f16" if precision == "f16" else "bf16"


def _program(out: Path, config: dict[str, Any]) -> Program:
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / "config.json"
    path.write_text(json.dumps(config))
    program = from_config(path)
    path.unlink()
    return program


def demo(out: Path, target: str) -> None:
    """The Gemini-style model in f32, the questions of examples/media about pictures, sounds and text, and the CPU's answers."""
    program = ws.from_pretrained(ROOT / "examples" / "gemini")
    ws.compile(program, out, target=target)
    cpu = out.with_name("demo-cpu")
    ws.compile(program, cpu, target="cpu")
    runner, found = ws.load(cpu), []
    media = ROOT / "examples" / "media"
    for q in json.loads((media / "questions.json").read_text()):
        if all(Path(n).suffix in (".png", ".wav") for n in q["media"]):
            prompt: list[Any] = [*(media / n for n in q["media"]), q["question"]]
            (answer,) = runner.generate([prompt], max_tokens=24)
            found.append({**q, "tokens": [int(t) for t in answer.tokens]})
            for n in q["media"]:
                shutil.copy(media / n, out.with_name(n))
    out.with_name("demo.json").write_text(json.dumps(found))
    shutil.rmtree(cpu)


def products(out: Path, machine: Target, n: int) -> None:
    """Products of n with activations in half precision, causal attention and linear attention over n positions, and a
    convolution of as many places: programs to be timed, and how many operations each is."""
    side, c, heads = round(n**0.5), min(n, 256), max(1, min(n // 64, 32))
    texts = {
        f"gemm-{d}": (2 * n**3, f"graph @f(%x: {half}[{n}, {n}]) {{\n  param %w: {t}[{n}, {n}]\n"
        f"  %y: {half}[{n}, {n}] = {how}(%x, %w)\n  return %y\n}}")
        for d, half, t, how in (
            ("f16", "f16", "f16", "linear"), ("bf16", "bf16", "bf16", "linear"),
            ("int4", "f16", "int4b32f16", "quantized_linear"), ("int8-bf16", "bf16", "int8b32f16", "quantized_linear"),
        )
    }  # fmt: skip
    for half in ("f16", "bf16"):
        shape = f"{half}[1, {n}, {heads}, 128]"
        # two products, of which causality leaves half
        texts[f"attention-{half}"] = 2 * n * n * heads * 128, f"""graph @f(%q: {shape}, %k: {shape}, %v: {shape}) {{
  %y: {shape} = attention(%q, %k, %v) {{scale=0.088, causal=true}}
  return %y
}}"""
    texts["conv-f16"] = 2 * 9 * c * c * side**2, f"""graph @f(%x: f16[1, {c}, {side}, {side}]) {{
  param %w: f16[{c}, {c}, 3, 3]
  %y: f16[1, {c}, {side}, {side}] = conv(%x, %w) {{strides=(1, 1), low=(1, 1), high=(1, 1)}}
  return %y
}}"""
    shape, state, of_token = f"bf16[1, {n}, {heads}, 128]", f"f32[1, {heads}, 128, 128]", f"bf16[1, {n}, {heads}]"
    # of a token: its key reads the state and is written to it, its query reads it
    texts["linear-attention-bf16"] = 6 * n * heads * 128 * 128, f"""graph @f(
    %q: {shape}, %k: {shape}, %v: {shape}, %a: {state}, %d: {of_token}, %b: {of_token}) {{
  %y: {shape}, %z: {state} = linear_attention(%q, %k, %v, %a, %d, %b) {{rule="gated_delta"}}
  return %y, %z
}}"""
    for name, (work, text) in texts.items():
        _write(out / name, parse_program(text), machine)
        (out / name / "work.json").write_text(json.dumps(work))


def model(out: Path, config: dict[str, Any], precision: str, machine: Target) -> None:
    """A program without its weights."""
    program, _ = ws.optimize(
        _program(out, config), quantize=precision, activation=_half(precision), granule=machine.granule, verify=False
    )
    _write(out, program, machine)
    (out / "config.json").write_text(json.dumps(config))


def _write(out: Path, program: Program, machine: Target) -> None:
    made = plan(program, machine)
    out.mkdir(parents=True)
    files = made.files()
    for file, write in files.items():
        write(out / file)
    described = {n: {"sha256": "", "bytes": (out / n).stat().st_size} for n in files}
    manifest = {**manifest_of(program, made, {}), "files": described, "digest": ""}
    left: Iterable[str] = sorted({x.why for x in made.left if x.kind != "fast"})
    (out / "manifest.json").write_text(json.dumps({**manifest, "settings": {"left": list(left)}}))


if __name__ == "__main__":
    main()
