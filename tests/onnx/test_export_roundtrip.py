"""import(export(g)) means what g means: whole models in every form that the passes give them, training, random graphs.

tests/roundtrip.py does the same with every graph of whichever tests it goes along with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from attention_zoo import CASES, MORE, Case
from onnx_graphs import HF, ONNX, training_step
from roundtrip import OPSETS, Sweep, roundtrip
from wasat.backends.onnx import FORMATS
from wasat.backends.onnx.errors import ExportError
from wasat.backends.onnx.registry import TABLE, Emission
from wasat.frontend import from_pretrained
from wasat.frontend.onnx import from_onnx
from wasat.ir import Graph, Node, Program, evaluate
from wasat.passes import FoldDequantized, PassManager, default_pipeline

from wasat.driver import optimize
from wasat.testing import feed, random_graph, random_program

SIZES = {"b": 2, "s": 5, "c": 24}
opsets = pytest.mark.parametrize("opset", OPSETS)


def sweep(program: Program, opset: int, sizes: Mapping[str, int] = SIZES) -> None:
    """Every graph of a program, on random inputs."""
    for name, g in program.graphs.items():
        roundtrip(program, name, feed(g, {n: sizes[n] for n in g.symbols}), opset)


TEXTS = {
    "half of a size": """graph @f(%x: f32[s, 4]) {
      %part: f32[(s + 1) // 2, 4] = slice(%x) {starts=(0, 0), stops=(s, 4), steps=(2, 1)}
      %rows: i64[(s + 1) // 2] = iota() {size=(s + 1) // 2}
      return %part, %rows
    }""",
    "a quotient that is negative": """graph @f(%x: f32[b, s, c]) {
      %rows: i64[] = dim_size() {size=(s - c) // b}
      return %rows
    }""",
    "a part of known size of an axis that may be shorter": """graph @f(%y: f32[b, s, 8]) {
      %g: f32[1, s, 8] = slice(%y) {starts=(0, 0, 0), stops=(1, s, 8), steps=(1, 1, 1)}
      %z: f32[b, s, 8] = mul(%g, %y)
      return %z
    }""",
    "a kernel of symbolic size": """graph @f(%x: f32[b, 2, s + 4], %w: f32[3, 2, s]) {
      %y: f32[b, 3, 5] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}
      return %y
    }""",
    "attention in f64": """graph @f(%q: f64[b, s, 2, 4], %k: f64[b, s, 1, 4]) {
      %y: f64[b, s, 2, 4] = attention(%q, %k, %k) {scale=0.5, causal=true}
      return %y
    }""",
    "rotary positions in f64": """graph @f(%x: f64[b, s, 2, 4], %at: i64[b, s], %freq: f64[2]) {
      %y: f64[b, s, 2, 4] = rope(%x, %at, %freq)
      return %y
    }""",
    "computed int8": """graph @f(%x: f32[b, 5, 70]) {
      %q: int8b32f16[b, 5, 70] = quantize(%x) {scheme="int8"}
      %y: f16[b, 5, 70] = dequantize(%q) {dtype=f16}
      return %y
    }""",
    "computed int4": """graph @f(%x: f16[b, 70]) {
      %q: int4b16f32[b, 70] = quantize(%x) {scheme="int4", block=16, scale=f32}
      %y: f32[b, 70] = dequantize(%q)
      return %y
    }""",
    "zeros quantized": """graph @f(%x: f32[b, 64]) {
      %zero: f32[b, 64] = mul(%x, 0.0:f32)
      %q: int4b32f16[b, 64] = quantize(%zero) {scheme="int4"}
      %y: f32[b, 64] = dequantize(%q)
      return %y
    }""",
}


CHOICE = """graph @f(%c: bool[], %x: f32[n, 3], %i: i64[k]) {
  %y: f32[k, 3], %z: f32[n, 3] = cond(%c, %x, %i) {then=graph @yes(%x: f32[n, 3], %i: i64[k]) {
    %y: f32[k, 3] = gather(%x, %i) {axis=0}
    return %y, %x
  }, otherwise=graph @no(%x: f32[n, 3], %i: i64[k]) {
    %y: f32[k, 3] = broadcast_to(2.0:f32) {shape=(k, 3)}
    %e: f32[n, 3] = scan(%x, %i) {body=graph @row(%x: f32[3], %i: i64[k]) {
      %any: bool[] = greater(%i_, 1.0:f32)
      %e: f32[3] = cond(%any, %x) {then=graph @t(%x: f32[3]) {
        %e: f32[3] = exp(%x)
        return %e
      }, otherwise=graph @o(%x: f32[3]) {
        %e: f32[3] = softmax(%x) {axis=0}
        return %e
      }}
      return %e
    }, carries=0, slices=1}
    return %y, %e
  }}
  return %y, %z
}""".replace("      %any", "      %i_: f32[] = reduce_max(%x) {axes=(0,)}\n      %any")


@opsets
@pytest.mark.parametrize("taken", [True, False])
def test_choices(taken: bool, opset: int) -> None:
    """With indices that are outside where they are not read."""
    x = np.random.default_rng(0).standard_normal((4, 3), np.float32) + 1
    given = {"c": np.array(taken), "x": x, "i": np.array([0, 3, -1] if taken else [7, 9, 9])}
    back = roundtrip(random_program(CHOICE), "f", given, opset)
    assert back["forward"].count("cond") == 1


@opsets
@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str, opset: int) -> None:
    """What an ONNX operator almost does."""
    sweep(random_program(TEXTS[name]), opset)


@opsets
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_attention(case: Case, opset: int) -> None:
    """As it is written, and fused."""
    written, fused = random_program(case.build()["forward"]), random_program(case.build()["forward"])
    PassManager(default_pipeline(kv_cache=None)).run(fused)
    assert fused["forward"].count("attention") == 1
    for program in (written, fused):
        sweep(program, opset)


@opsets
@pytest.mark.parametrize("folder", HF, ids=lambda p: p.name)
def test_decoders(folder: Path, opset: int) -> None:
    """As declared, and as prefill and decode with caches."""
    program = from_pretrained(folder)
    sweep(program, opset)
    sweep(optimize(program, chunk=8)[0], opset)


@opsets
@pytest.mark.parametrize("scheme, activation", [("int8", "int8"), ("int4", None), ("int4", "int8"), ("bf16", None)])
def test_quantized(scheme: str, activation: str | None, opset: int) -> None:
    sweep(optimize(from_pretrained(HF[0]), quantize=scheme, activation=activation, chunk=8)[0], opset)


@opsets
@pytest.mark.parametrize("scheme", ["q4_k", "q5_0", "iq4_nl", "int8b32f16", "int4b64f32", "int4zb64f16", "int8zb128bf16"])
def test_quantized_weights_in_one(scheme: str, opset: int) -> None:
    """As merge-linears leaves them: values, scales and offsets are joined each for themselves."""
    program = random_program(f"""graph @f(%x: f32[b, s, 256]) {{
      param %q: {scheme}[8, 256]
      param %k: {scheme}[3, 256]
      %w: {scheme}[11, 256] = concat(%q, %k) {{axis=0}}
      %y: f32[b, s, 11] = quantized_linear(%x, %w)
      return %y
    }}""")
    sweep(program, opset)


@opsets
def test_a_quantized_input_is_refused(opset: int) -> None:
    program = random_program("""graph @f(%x: f32[2, 256], %w: q4_k[3, 256]) {
      %y: f32[2, 3] = quantized_linear(%x, %w)
      return %y
    }""")
    with pytest.raises(ExportError, match="a quantized input"):
        sweep(program, opset)


@pytest.mark.parametrize("matmul_nbits", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_come_back_quantized(scheme: str, matmul_nbits: bool) -> None:
    """The same integers and scales, bit for bit, in the standard's operators and in onnxruntime's."""
    program = optimize(from_pretrained(HF[0]), quantize=scheme, activation=None, chunk=8, formats=FORMATS)[0]
    g = program["decode"]
    back = roundtrip(program, "decode", feed(g, {n: SIZES[n] for n in g.symbols}), OPSETS[-1], matmul_nbits=matmul_nbits)
    PassManager([FoldDequantized()]).run(back)
    assert back["forward"].count("quantized_linear") == g.count("quantized_linear") > 0
    products = {n.inputs[1].param: m.inputs[1].param for n, m in zip(linears(g), linears(back["forward"]))}
    for name, theirs in products.items():
        mine, other = program.params[name].load(), back.params[theirs].load()
        assert mine.type == other.type
        np.testing.assert_array_equal(mine.values, other.values)
        np.testing.assert_array_equal(mine.scales, other.scales)


def linears(g: Graph) -> list[Node]:
    return [n for n in g.nodes if n.op.name == "quantized_linear"]


@pytest.mark.parametrize("path", ONNX, ids=lambda p: p.stem)
def test_imported(path: Path) -> None:
    """What torch exported, again at its own inputs: as imported at an old operator set, fused at a new one."""
    program = from_onnx(path)
    with np.load(path.with_suffix(".npz")) as data:
        inputs = {v.name: data[f"in.{v.name}"] for v in program["forward"].inputs}
    roundtrip(program, "forward", inputs, OPSETS[0])
    PassManager(default_pipeline(kv_cache=None)).run(program)
    roundtrip(program, "forward", inputs, OPSETS[-1])


@opsets
def test_training(opset: int) -> None:
    """A step: losses, gradients, clipping, the optimizer with its states."""
    program, states = training_step()
    ids = np.random.default_rng(0).integers(0, 40, (2, 7))
    roundtrip(program, "train_step", {"tokens": ids[:, :-1], "labels": ids[:, 1:], **states}, opset)


@opsets
@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed: int, opset: int) -> None:
    sweep(random_program(random_graph(np.random.default_rng(seed), 60)), opset, {"b": 2, "s": 3})


def test_a_wrong_export_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function and by the plugin, which goes on and says which graph it was."""
    wrong = Emission(lambda e, node, x, y: e.op("Add", y, y), 17, lambda node, options: True)
    monkeypatch.setitem(TABLE, "add", [wrong])
    program = random_program("graph @sum(%x: f32[2], %y: f32[2]) {\n  %z: f32[2] = add(%x, %y)\n  return %z\n}")
    inputs = feed(program["sum"], {})
    with pytest.raises(AssertionError, match="output z of @sum at operator set 18"):
        roundtrip(program, "sum", inputs, OPSETS[0])
    plugin = Sweep()
    plugin.evaluated(program["sum"], inputs, {}, evaluate(program["sum"], inputs))
    assert len(plugin.wrong) == len(OPSETS)
    assert "@sum" in plugin.wrong[0]
