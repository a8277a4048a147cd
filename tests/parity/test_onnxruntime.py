"""Exported models give onnxruntime the interpreter's numbers: operations, attention in many spellings, decoders whole and with
caches, fused and decomposed, quantized or not, what torch exported, a training step, random graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from attention_zoo import CASES, MORE, Case
from onnx_graphs import HF, ONNX, graph_of, training_step
from wasat.backends.onnx import to_onnx
from wasat.frontend import from_pretrained
from wasat.frontend.onnx import from_onnx
from wasat.ir import OPS, Program, TensorType, evaluate
from wasat.passes import PassManager, default_pipeline

from wasat.driver import optimize
from wasat.testing import feed, random_graph, random_program

MODEL = Path(__file__).parents[2] / "examples" / "pygemma"
SWEPT = ("attention", "cached_attention", "cache_update", "rope", "rms_norm", "layer_norm", "gelu", "silu", "glu", "softmax",
         "log_softmax", "linear", "dequantize", "quantized_linear", "quantized_embedding", "embedding", "conv", "sort", "top_k",
         "scatter", "cumsum", "take_row", "one_hot")  # fmt: skip
"""Operations whose ONNX form is more than one operator's plain definition, or whose operator has a kernel of many cases."""


def run(path: Path, inputs: dict[str, Any]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def compare(program: Program, graph: str, inputs: dict[str, Any], path: Path, tol: float = 1e-4, **options: Any) -> None:
    g = program[graph]
    to_onnx(program, path, graph=graph, **options)
    want = evaluate(g, inputs, {name: program.params[name].load() for name in g.params})
    for name, got, w in zip(g.output_names, run(path, inputs), want):
        assert isinstance(w, np.ndarray)
        assert (got.shape, got.dtype) == (w.shape, w.dtype), name
        np.testing.assert_allclose(got, w, rtol=tol, atol=tol, err_msg=name)


@pytest.mark.parametrize("opset", [17, 21, 23, 24])
@pytest.mark.parametrize("name", SWEPT)
def test_operations(name: str, opset: int, tmp_path: Path) -> None:
    for sample in OPS[name].samples():
        program, feeds = graph_of(OPS[name], sample)
        if name == "conv" and 0 in program["one"].outputs[0].shape:
            continue  # onnxruntime refuses a convolution without a result
        narrow = any(isinstance(v.type, TensorType) and v.type.dtype.bits < 32 for v in program["one"].values())
        if any(isinstance(x, np.ndarray) and x.dtype.kind == "f" and np.isnan(x).any() for x in sample.inputs):
            continue
        compare(program, "one", feeds, tmp_path / "m.onnx", 1e-2 if narrow else 1e-4, opset=opset)


@pytest.mark.parametrize("opset", [17, 22, 23, 24])
def test_forward(opset: int, tmp_path: Path) -> None:
    program = from_pretrained(MODEL)
    for batch, s in ((1, 1), (2, 40)):
        tokens = np.random.default_rng(0).integers(0, 500, (batch, s))
        compare(program, "forward", {"tokens": tokens}, tmp_path / "m.onnx", opset=opset)


@pytest.mark.parametrize("quantize, options", [
    (None, {"opset": 17}), (None, {"opset": 24}), ("int8", {"opset": 24}), ("int4", {"opset": 21}), ("int4", {"opset": 24}),
    ("int4", {"opset": 24, "matmul_nbits": True}), ("int8", {"opset": 24, "matmul_nbits": True}),
])  # fmt: skip
@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_caches(graph: str, quantize: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    program, _ = optimize(from_pretrained(MODEL), quantize=quantize, activation=None, chunk=16)
    g = program[graph]
    sizes = {"b": 2, "s": 5, "c": 64}
    inputs = feed(g, {name: sizes[name] for name in g.symbols})
    compare(program, graph, inputs, tmp_path / "m.onnx", **options)


# -- whole graphs: those of tests/onnx/test_export_roundtrip.py -------------------------------------------------------------
opsets = pytest.mark.parametrize("opset", [18, 24])


def sweep(program: Program, opset: int, path: Path, tol: float = 1e-4, **sizes: int) -> None:
    for name, g in program.graphs.items():
        compare(program, name, feed(g, {n: sizes[n] for n in g.symbols}), path, tol, opset=opset)


@opsets
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_attention(case: Case, opset: int, tmp_path: Path) -> None:
    written, fused = random_program(case.build()["forward"]), random_program(case.build()["forward"])
    PassManager(default_pipeline(kv_cache=None)).run(fused)
    for program in (written, fused):
        sweep(program, opset, tmp_path / "m.onnx", 3e-2 if case.dtype == "f16" else 1e-4, b=2, s=5)


@opsets
@pytest.mark.parametrize("folder", HF, ids=lambda p: p.name)
def test_decoders(folder: Path, opset: int, tmp_path: Path) -> None:
    program = from_pretrained(folder)
    sweep(program, opset, tmp_path / "m.onnx", b=2, s=5)
    sweep(optimize(program, chunk=8)[0], opset, tmp_path / "m.onnx", b=2, s=5, c=24)


@pytest.mark.parametrize("path", ONNX, ids=lambda p: p.stem)
def test_imported(path: Path, tmp_path: Path) -> None:
    program = from_onnx(path)
    with np.load(path.with_suffix(".npz")) as data:
        inputs = {v.name: data[f"in.{v.name}"] for v in program["forward"].inputs}
    compare(program, "forward", inputs, tmp_path / "m.onnx", opset=18)
    PassManager(default_pipeline(kv_cache=None)).run(program)
    compare(program, "forward", inputs, tmp_path / "m.onnx", opset=24)


@opsets
def test_training(opset: int, tmp_path: Path) -> None:
    program, states = training_step()
    ids = np.random.default_rng(0).integers(0, 40, (2, 7))
    inputs = {"tokens": ids[:, :-1], "labels": ids[:, 1:], **states}
    compare(program, "train_step", inputs, tmp_path / "m.onnx", opset=opset)


@opsets
@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed: int, opset: int, tmp_path: Path) -> None:
    sweep(random_program(random_graph(np.random.default_rng(seed), 60)), opset, tmp_path / "m.onnx", b=2, s=3)
