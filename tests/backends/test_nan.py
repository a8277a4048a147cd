"""A NaN in an operand of a CPU kernel comes out where the reference has it, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import evaluate, parse_program
from wasat.ir.graph import ArrayParam
from wasat.ir.ops.quant import quantize_array
from wasat.ir.types import QTensorType
from wasat.passes import Cleanup, PassManager

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "sigmoid")
HEADS = "(%q: f32[b, s, 2, 8], %k: f32[b, s, 2, 8], %v: f32[b, s, 2, 8]) {"
GRAPHS = {
    "attention": f"{HEADS} %y: f32[b, s, 2, 8] = attention(%q, %k, %v) {{scale=0.3}}",
    "attention_softcap": f"{HEADS} %y: f32[b, s, 2, 8] = attention(%q, %k, %v) {{scale=0.3, softcap=5.0}}",
    "rms_norm": "(%x: f32[s, 40]) { param %w: f32[40] %y: f32[s, 40] = rms_norm(%x, %w) {eps=1e-5}",
    "layer_norm": "(%x: f32[s, 40]) { param %w: f32[40] %y: f32[s, 40] = layer_norm(%x, %w, %w) {eps=1e-5}",
    "rope": "(%x: f32[b, s, 2, 8], %i: i64[s]) { param %f: f32[4] %y: f32[b, s, 2, 8] = rope(%x, %i, %f)",
    "linear": "(%x: f32[s, 40]) { param %m: f32[70, 40] %y: f32[s, 70] = linear(%x, %m)",
} | {
    f"linear_{t}_{a}": f"(%x: f32[s, 40]) {{ param %{t}: {t}b32f16[70, 40] %y: f32[s, 70] = quantized_linear(%x, %{t})"
    f"{' {activation=' + chr(34) + a + chr(34) + '}' if a != 'none' else ''}"
    for t in ("int8", "int4") for a in ("int8", "none")
} | {
    f"glu_{a}": f"(%x: f32[s, 80]) {{ %y: f32[s, 40] = glu(%x) {{activation=\"{a}\"}}" for a in ACTIVATIONS
}  # fmt: skip
SIZES = {"b": 2, "s": 5}


@pytest.fixture(scope="module")
def compiled() -> Runner:
    program = parse_program("".join(f"graph @{name}{text}\n return %y }}\n" for name, text in GRAPHS.items()))
    rng = np.random.default_rng(0)
    for graph in program.graphs.values():
        for name, v in graph.params.items():
            x = rng.standard_normal([int(d) for d in v.type.shape]).astype(np.float32)  # type: ignore[arg-type]
            array = quantize_array(x, v.type) if isinstance(v.type, QTensorType) else x
            program.params.setdefault(name, ArrayParam(array, v.type))
    return Runner(program, cpu())


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_nan_stays(name: str, compiled: Runner) -> None:
    g = compiled.program[name]
    params = {n: compiled.program.params[n].load() for n in g.params}
    rng = np.random.default_rng(1)
    for planted in g.inputs:
        if not planted.tensor.dtype.is_float:
            continue
        feeds = {}
        for v in g.inputs:
            shape = [SIZES.get(str(d), d) for d in v.type.shape]
            feeds[v.name] = rng.standard_normal(shape).astype(np.float32) if v.tensor.dtype.is_float else np.arange(shape[0])
        x = feeds[planted.name]
        for at in (0, x.size // 2 + 3, x.size - 1):
            damaged = feeds | {planted.name: x.copy()}
            damaged[planted.name].flat[at] = np.nan
            want = np.isnan(np.asarray(evaluate(g, damaged, params)[0]))
            assert 0 < want.sum() < want.size
            got = np.isnan(compiled(name, damaged)["y"])
            np.testing.assert_array_equal(got, want, err_msg=f"{planted.name}[{at}]")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_row_of_integers_with_a_number_that_is_none(scheme: str, bad: float, compiled: Runner) -> None:
    """int8 has no NaN and no infinity: every output of such a row is NaN, and those of other rows are as they were."""
    name = f"linear_{scheme}_int8"
    g = compiled.program[name]
    params = {n: compiled.program.params[n].load() for n in g.params}
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    before = compiled(name, {"x": x})["y"]
    x[1, 35] = bad
    (want,) = evaluate(g, {"x": x}, params)
    for y in (compiled(name, {"x": x})["y"], np.asarray(want)):
        assert np.isnan(y[1]).all()
        np.testing.assert_allclose(y[[0, 2]], before[[0, 2]], rtol=1e-4, atol=1e-4)


def test_nan_of_all_bits_is_none_other_in_bf16() -> None:
    """What GPUs return as NaN; in half of its bits it is cut, and rounding must not carry into the sign."""
    program = parse_program("graph @f(%x: f32[n]) { %y: bf16[n] = cast(%x) {dtype=bf16}\n return %y }")
    x = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000], np.uint32).view(np.float32)
    y = np.asarray(Runner(program, cpu())("f", {"x": x})["y"]).astype(np.float32)
    assert np.isnan(y).tolist() == [True, True, True, False]


def _nothing_is_known(dtype: str) -> dict[str, str]:
    """Expressions of which TVM believes to know the value whatever x is."""
    head, x, truth = f"(%x: {dtype}[n]) {{\n", f"{dtype}[n]", "bool[n]"
    return {
        "not_equal": head + f" %y: {truth} = not_equal(%x, %x)",
        "equal": head + f" %e: {truth} = equal(%x, %x)\n %y: {x} = select(%e, %x, 7.0:{dtype})",
        "reshaped": head + f" %r: {dtype}[1, n] = reshape(%x) {{shape=(1, n)}}\n %s: {x} = reshape(%r) {{shape=(n,)}}\n"
        f" %e: {truth} = equal(%x, %s)\n %y: {truth} = logical_not(%e)",
        "times_0": head + f" %y: {x} = mul(%x, 0.0:{dtype})",
        "times_minus_0": head + f" %y: {x} = mul(%x, -0.0:{dtype})",
        "zeros_times": head + f" %z: {x} = broadcast_to(0.0:{dtype}) {{shape=(n,)}}\n %y: {x} = mul(%z, %x)",
        "zero_over": head + f" %y: {x} = div(0.0:{dtype}, %x)",
        "over_0": head + f" %y: {x} = div(%x, 0.0:{dtype})",
        "over_minus_0": head + f" %y: {x} = div(%x, -0.0:{dtype})",
        "none_over_0": head + f" %z: {x} = broadcast_to(0.0:{dtype}) {{shape=(n,)}}\n %y: {x} = div(%z, 0.0:{dtype})",
        "minus_itself": head + f" %e: {x} = neg(%x)\n %f: {x} = neg(%x)\n %y: {x} = sub(%e, %f)",
        "over_itself": head + f" %y: {x} = div(%x, %x)",
        "exp_of_0": head + f" %z: {x} = mul(%x, 0.0:{dtype})\n %y: {x} = exp(%z)",
    }


@pytest.mark.parametrize("optimized", [False, True], ids=["as written", "optimized"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_nothing_is_known_of_a_float(optimized: bool) -> None:
    texts = {f"{k}_{d}": t for d in ("f32", "f16", "bf16", "f64") for k, t in _nothing_is_known(d).items()}
    text = "".join(f"graph @{name}{text}\n return %y\n}}\n" for name, text in texts.items())
    program, wanted = parse_program(text), parse_program(text)
    if optimized:
        PassManager([Cleanup()]).run(program)
    runner = Runner(program, cpu())
    for name in texts:
        v = program[name].inputs[0]
        x = np.array([1, np.nan, -2, np.inf, -np.inf, 0, -0.0, 3]).astype(v.tensor.dtype.np)
        [got], [want] = runner(name, {"x": x}).values(), evaluate(wanted[name], {"x": x})
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64), err_msg=name)
        if want.dtype != bool:
            assert (np.signbit(got) == np.signbit(want))[~np.isnan(want.astype(np.float64))].all(), name


@pytest.mark.parametrize("k", [2, 6])
def test_nan_is_the_greatest(k: int) -> None:
    """As torch.sort and torch.topk have it, and ONNX: among the largest it comes first, and nobody takes it for small."""
    program = parse_program(f"""graph @f(%x: f32[6]) {{
  %up: f32[6] = sort(%x) {{axis=0}}
  %down: f32[6] = sort(%x) {{axis=0, descending=true}}
  %large: f32[{k}], %at: i64[{k}] = top_k(%x) {{k={k}, axis=0}}
  %small: f32[{k}], %there: i64[{k}] = top_k(%x) {{k={k}, axis=0, largest=false}}
  return %up, %down, %large, %at, %small, %there
}}""")
    x = np.array([1, np.nan, 3, -np.inf, np.nan, 3], np.float32)
    down, places = np.array([np.nan, np.nan, 3, 3, 1, -np.inf], np.float32), np.array([1, 4, 2, 5, 0, 3])
    up, there = np.array([-np.inf, 1, 3, 3, np.nan, np.nan], np.float32), np.array([3, 0, 2, 5, 1, 4])
    for found in (evaluate(program["f"], {"x": x}), [*Runner(program, cpu())("f", {"x": x}).values()]):
        for got, want in zip(found, (up, down, down[:k], places[:k], up[:k], there[:k]), strict=True):
            np.testing.assert_array_equal(got, want)
