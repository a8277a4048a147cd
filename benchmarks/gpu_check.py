"""Runs a bundle on the machine at hand, with Python, NumPy, tokenizers and Pillow alone; torch is compared with if it is there.

    python gpu_check.py                              # everything, results in gpu-check.json
    python gpu_check.py --only operations,decoders   # in parts: also demo, products, models, torch
    python gpu_check.py --only models --match 8b

Written after every part, so that what is cut short is not lost. Rates are medians; a share of the bandwidth is of that which a
copy on the same device moves, counted as bytes read and written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import wasat_runtime as runtime
from wasat_runtime.engine import Engine
from wasat_runtime.hosts.host import Host
from wasat_runtime.hosts.open import open_machine
from wasat_runtime.hosts.plan import read_plan
from wasat_runtime.manifest import parse_manifest
from wasat_runtime.model import Model

HERE = Path(__file__).resolve().parent
TOLERANCE = {"float64": 1e-9, "float32": 3e-5, "float16": 1e-2, "bfloat16": 1e-2}
PROMPT, TOKENS = 128, 64
"""Of a comparison with transformers; what models are timed with, ``lengths.json`` says."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="operations,decoders,demo,products,models,torch")
    parser.add_argument("--match", default="", help="only what has this in its name")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    args = parser.parse_args()
    return check(HERE, args.only.split(","), args.match, args.out)


def check(bundle: Path, parts: list[str], match: str, out: Path) -> int:
    """Runs the parts; returns how many cases failed."""
    doing = {"operations": operations, "decoders": decoders, "demo": demo, "products": products, "models": models}
    doing["torch"] = torch_rates
    found: dict[str, Any] = {}
    failed = 0
    for part in parts:
        started = time.perf_counter()
        try:
            found[part] = doing[part](bundle, match)
        except Exception:
            found[part] = {"failed": {part: traceback.format_exc()}}
        failed += len(found[part].get("failed", ()))
        found[part]["seconds"] = round(time.perf_counter() - started, 1)
        out.write_text(json.dumps(found, indent=1))
        print(f"{part}: {_line(found[part])}", flush=True)
    return failed


def _line(part: dict[str, Any]) -> str:
    lines = [f"{len(part['passed'])} passed"] if "passed" in part else []
    lines += [f"{name} FAILED: {why.strip().splitlines()[-1]}" for name, why in part.get("failed", {}).items()]
    lines += [f"{name}: {rates}" for name, rates in part.get("rates", {}).items()]
    return "\n  ".join([*lines, f"{part['seconds']} s"])


def _each(folder: Path, match: str, run: Callable[[Path], Any]) -> dict[str, Any]:
    """Runs what lies in ``folder``, one after the other; what fails does not end it."""
    passed, failed = [], {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and match in p.name):
        try:
            run(path)
            passed.append(path.name)
        except Exception:
            failed[path.name] = traceback.format_exc()
    return {"passed": passed, "failed": failed}


# -- right or wrong -----------------------------------------------------------------------------------------------------------
def operations(bundle: Path, match: str) -> dict[str, Any]:
    """Every sample of every operation, beside the reference."""
    found: dict[str, Any] = {"passed": [], "failed": {}}
    for folder in sorted((bundle / "operations").iterdir()):
        _operations(folder, match, found)
    return found


def _operations(folder: Path, match: str, found: dict[str, Any]) -> None:
    about = json.loads((folder / "about.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    plan = read_plan(folder, about["kind"])
    host = Host(plan, open_machine(about["kind"], plan.needs))
    for entry, e in about["entries"].items():
        if match not in entry:
            continue
        try:
            given = [host.memory.buffer_of(arrays[x["key"]], x["dtype"]) for x in (*e["inputs"], *e["weights"])]
            got = host.function(entry)(*given)
            assert len(got) == len(e["outputs"])
            for x, want in zip(got, e["outputs"]):
                _same(x, arrays[want["key"]], want["dtype"], e["graph"])
            found["passed"].append(entry)
        except Exception:
            found["failed"][entry] = traceback.format_exc()


def _same(x: np.ndarray, want: np.ndarray, dtype: str, where: str) -> None:
    if dtype == "bfloat16":
        x, want = (a.view(np.uint16).astype(np.uint32).__lshift__(16).view(np.float32) for a in (x, want))
    tolerance = TOLERANCE.get(dtype)
    if tolerance is None:
        np.testing.assert_array_equal(x, want, err_msg=where)
    else:
        a, b = (y.astype(np.float64) for y in (x, want))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=where)


def decoders(bundle: Path, match: str) -> dict[str, Any]:
    """Small models of every precision: logits of each position after five, prefilled and decoded, beside the interpreter's."""
    return _each(bundle / "decoders", match, _decoder)


def _decoder(folder: Path) -> None:
    held = np.load(folder.with_suffix(".npz"))
    tokens, want = held["tokens"], held["logits"]
    session = runtime.load(folder).session(1)
    got = [session.step(tokens[:, :5])[0]]
    got += [session.step(tokens[:, i : i + 1])[0] for i in range(5, tokens.shape[1])]
    off = np.abs(np.stack(got).astype(np.float64) - want[0, 4:])
    wrong = ~(off <= held["allowed"][0, 4:])
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} logits are wrong, by {off[wrong].max():.2g} at most"


def demo(bundle: Path, match: str) -> dict[str, Any]:
    """The Gemini-style model: tokens of its answers to text, pictures and sounds, beside the CPU's."""
    passed, failed = [], {}
    model = runtime.load(bundle / "demo")
    for q in json.loads((bundle / "demo.json").read_text()):
        prompt: list[Any] = [*(bundle / n for n in q["media"]), q["question"]]
        try:
            (answer,) = model.generate([prompt], max_tokens=24)
            assert answer.tokens == q["tokens"], f"{answer.tokens} instead of {q['tokens']}"
            passed.append(q["title"])
        except Exception:
            failed[q["title"]] = traceback.format_exc()
    return {"passed": passed, "failed": failed}


# -- how fast -----------------------------------------------------------------------------------------------------------------
def _engine(folder: Path) -> Engine:
    """A program whose weights are made here: the same some megabytes of bits, which are f16 of about 0.02, again and again."""
    manifest = parse_manifest(json.loads((folder / "manifest.json").read_text()))
    plan = read_plan(folder, manifest.target.kind)
    host = Host(plan, open_machine(manifest.target.kind, plan.needs))
    rng = np.random.default_rng(0)
    block = host.memory.buffer_of((0.02 * rng.standard_normal(1 << 22)).astype(np.float16).view(np.uint32))
    weights = {}
    for spec in manifest.weights:
        w = weights[spec.name] = host.memory.zeros(spec.dtype, [int(d) for d in spec.shape])
        for at in range(0, w.nbytes, block.nbytes):
            part = w.piece.part(at, min(block.nbytes, w.nbytes - at))
            host.machine.copy(block.piece.part(0, part.nbytes), part)
    return Engine(folder, manifest, host, weights, host.memory)


def _timed(run: Callable[[], Any], times: int = 10) -> float:
    """Seconds of one, the median."""
    for _ in range(3):
        run()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def bandwidth(machine: Any, nbytes: int) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    a, b = machine.allocate(nbytes), machine.allocate(nbytes)
    last = b.part(0, 4)

    def run() -> None:
        for _ in range(10):
            machine.copy(a, b)
        machine.read([last])

    return 20 * nbytes / _timed(run, 5)


def products(bundle: Path, match: str) -> dict[str, Any]:
    """Large products, convolutions and attention, in TFLOP/s, arguments on the device."""
    rates: dict[str, Any] = {}

    def run(folder: Path) -> None:
        engine = _engine(folder)
        host: Any = engine._library
        entry = engine.entry("f")
        rng = np.random.default_rng(1)
        given = []
        for spec in entry.inputs:
            x = rng.standard_normal([int(d) for d in spec.shape], np.float32)
            if spec.dtype != "float32":
                x = (x.view(np.uint32) >> 16).astype(np.uint16) if spec.dtype == "bfloat16" else x.astype(np.float16)
            given.append(engine.memory.buffer_of(x, spec.dtype))
        given += engine.weights_of("f")
        host.function("f")(*given)
        recorded = next(iter(host._recorded["f"].values())).commands
        first = given[0].piece.part(0, 4)
        empty = _timed(lambda: host.machine.run([], [first]))
        seconds = (_timed(lambda: host.machine.run(recorded * 10, [first]), 5) - empty) / 10
        work = json.loads((folder / "work.json").read_text())
        rates[folder.name] = {"ms": seconds * 1e3, "TFLOP/s": work / seconds / 1e12}

    return {**_each(bundle / "products", match, run), "rates": rates}


def models(bundle: Path, match: str) -> dict[str, Any]:
    """Tokens a second of one row, of published shapes: prefilled with so many tokens, and decoding after the fewest of them."""
    rates: dict[str, Any] = {}
    lengths = json.loads((bundle / "lengths.json").read_text())

    def run(folder: Path) -> None:
        engine = _engine(folder)
        machine = engine.memory.machine
        model = Model(engine)
        total = sum(w.nbytes for w in engine.weights.values())
        rng = np.random.default_rng(2)
        vocabulary = int(model.manifest.interface.vocab or 1000)
        prompt = rng.integers(3, vocabulary, (1, max(lengths["prefill"])))
        prefill = {}
        for n in lengths["prefill"]:
            session = model.session(1)

            def once(session: Any = session, n: int = n) -> None:
                session.reset()
                session.step(prompt[:, :n])

            prefill[n] = n / _timed(once, 5)
        session = model.session(1)
        session.step(prompt[:, : min(lengths["prefill"])])
        token, steps = np.array([[5]]), []
        for _ in range(lengths["decode"]):
            started = time.perf_counter()
            session.step(token)
            steps.append(time.perf_counter() - started)
        seconds = statistics.median(steps[4:])  # of which the first two are no graphs yet
        share = total / seconds / bandwidth(machine, min(1 << 31, 4 * total // 4 * 4))
        rates[folder.name] = {
            "weights": total, "prefill tokens/s": prefill, "decode tokens/s": 1 / seconds, "share of bandwidth": share,
        }  # fmt: skip

    return {**_each(bundle / "models", match, run), "rates": rates}


def torch_rates(bundle: Path, match: str) -> dict[str, Any]:
    """What torch and transformers do on the same device, where they are installed."""
    try:
        import torch
    except ImportError:
        return {"rates": {}, "note": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"rates": {}, "note": "torch sees no GPU"}
    rates: dict[str, Any] = {"versions": {"torch": torch.__version__, "device": torch.cuda.get_device_name()}}
    n = 4096

    def rate(run: Callable[[], Any], flops: float) -> dict[str, float]:
        def ten() -> None:
            for _ in range(10):
                run()
            torch.cuda.synchronize()

        seconds = _timed(ten, 5) / 10
        return {"ms": seconds * 1e3, "TFLOP/s": flops / seconds / 1e12}

    for name in ("float16", "bfloat16"):
        a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, name)) for _ in range(2))
        rates[f"gemm-{name}"] = rate(lambda a=a, b=b: a @ b.T, 2 * n**3)
    q, k, v = (torch.randn(1, 32, n, 128, device="cuda", dtype=torch.float16) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        rates["attention-float16"] = rate(lambda: attend(q, k, v, is_causal=True), 2 * 2 * n * n * 32 * 128 / 2)
    failed = {}
    for path in sorted(bundle.glob("models/*-bf16")):
        if match in path.name:
            shape = path.name.removesuffix("-bf16")
            for how in ("eager", "static", "compiled"):
                try:
                    rates[f"transformers-{shape}-{how}"] = _transformers(json.loads((path / "config.json").read_text()), how)
                except Exception:
                    failed[f"transformers-{shape}-{how}"] = traceback.format_exc()
    return {"rates": rates, "failed": failed}


def _transformers(config: dict[str, Any], how: str) -> dict[str, float]:
    """Decoding after a prompt, in bf16: the time of 64 tokens more, so that the prompt's is not in it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**config)).eval()
        prompt = torch.randint(3, 1000, (1, PROMPT))
    options: dict[str, Any] = {} if how == "eager" else {"cache_implementation": "static"}
    if how == "compiled":
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    elif how == "static":
        options["disable_compile"] = True

    def run(tokens: int) -> float:
        def once() -> None:
            with torch.no_grad():
                model.generate(
                    prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                    attention_mask=torch.ones_like(prompt), **options,
                )  # fmt: skip
            torch.cuda.synchronize()

        return _timed(once, 3)

    seconds = (run(1 + TOKENS) - run(1)) / TOKENS
    return {"decode tokens/s": 1 / seconds}


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
