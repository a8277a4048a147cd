"""Gradients of whole graphs: text, finite differences in float64, second derivatives, torch's own, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from rounding import assert_near, bound, spread
from wasat.frontend import from_pretrained
from wasat.ir import Array, Builder, Graph, IRError, Loc, NotDifferentiable, Program, Value, evaluate, parse, parse_type, verify
from wasat.passes import Cleanup, Differentiate, FuseAttention, FuseNorm, FuseRope, PassError, PassManager
from wasat.training.losses import add_loss, cross_entropy

from wasat.testing import InterpreterCheck, random_program

GOLDEN = Path(__file__).parent.parent / "golden"
SQUARE = """graph @loss(%x: f64[n], %w: f64[n]) {
  %p: f64[n] = mul(%x, %w)
  %s: f64[n] = sin(%p)
  %y: f64[] = reduce_sum(%s) {axes=(0,)}
  return %y
}"""


def differentiated(program: str | Graph | Program, *passes: Differentiate) -> tuple[Program, list[str]]:
    program = program if isinstance(program, Program) else random_program(program)
    report = PassManager(passes).run(program)
    assert all(step.modified for step in report.steps)
    for g in program.graphs.values():
        assert str(parse(str(g))) == str(g)
    return program, [str(r).splitlines()[0] for r in report.remarks()]


def check_differences(program: Program, feed: dict[str, Array], output: str, into: str = "gradients", suffix: str = "") -> None:
    """Every ``grad.X`` (+ suffix) of @into against differences of ``output``, element by element.

    Of central differences over h and 2h the extrapolation is wrong in h^4. Allowed are a thousandth of what it corrects (what
    is wrong in h^2, times h), what the rounding of ``output`` makes of it, and the gradient's own rounding.
    """
    g = program[into]
    params = {k: np.array(program.params[k].load()) for k in g.params}
    feed = {k: np.array(v) for k, v in feed.items()}
    results = dict(zip(g.output_names, zip(evaluate(g, feed, params), spread(g, feed, params))))
    forward = g.clone()
    forward.set_outputs([forward.outputs[g.output_names.index(output)]])
    PassManager([Cleanup()], verify=False).run(Program({"g": forward}))
    params_of_forward = {k: params[k] for k in forward.params}  # what is moved below is moved in these
    h, noise = 1e-3, 4 * float(spread(forward, feed, params_of_forward)[0])
    for name, x in {**params, **feed}.items():
        if f"grad.{name}{suffix}" not in results:
            continue
        got, far = results[f"grad.{name}{suffix}"]
        near, wide = np.zeros_like(x), np.zeros_like(x)
        for i in np.ndindex(x.shape):  # type: ignore[arg-type]
            at = x[i]  # type: ignore[index]
            for step, slopes in ((h, near), (2 * h, wide)):
                ends = []
                for moved in (at + step, at - step):
                    x[i] = moved  # type: ignore[index]
                    ends.append(evaluate(forward, feed, params_of_forward)[0])
                slopes[i] = (ends[0] - ends[1]) / (2 * step)
            x[i] = at  # type: ignore[index]
        want = near + (near - wide) / 3
        assert_near(got, want, h * np.abs(near - wide) + 2 * noise / h + bound(want, far), name)


def test_text() -> None:
    program, remarks = differentiated(SQUARE, Differentiate(wrt=("w",)))
    assert str(program["loss"]) == str(parse(SQUARE))
    PassManager([Cleanup()]).run(program)
    assert str(program["gradients"]) == str(
        parse("""graph @gradients(%x: f64[n], %w: f64[n]) {
  %p: f64[n] = mul(%x, %w)
  %s: f64[n] = sin(%p)
  %y: f64[] = reduce_sum(%s) {axes=(0,)}
  %cos: f64[n] = cos(%p)
  %mul_2: f64[n] = mul(%cos, %x)
  return %y, "grad.w"=%mul_2
}""")
    )
    assert remarks == ["applied: y with respect to w (@gradients)"]


def everything() -> Graph:
    """Embedding, norms, rope, attention, glu, conv, dropout, scatter and softmax in one small model, in f64."""
    g = Graph("loss")
    b = Builder(g)

    def param(name: str, *shape: int) -> Value:
        return g.add_param(name, parse_type(f"f64[{', '.join(map(str, shape))}]"))

    ids, key = g.add_input("ids", parse_type("i64[b, s]")), g.add_input("key", parse_type("u32[2]"))
    extra = g.add_input("extra", parse_type("f64[2, 4]"))
    table = b.scatter(param("table", 5, 4), b.constant(np.array([1, 3])), extra, axis=0, reduce="add")
    x = b.embedding(table, ids, dtype="f64")
    n = b.rms_norm(x, param("norm", 4), eps=1e-3)
    q, k, v = (b.reshape(b.linear(n, param(f"{c}.weight", 4, 4)), shape=(*x.shape[:2], 2, 2)) for c in "qkv")
    at = b.iota(size=x.shape[1])
    q, k = (b.rope(z, at, b.constant(np.array([0.7]))) for z in (q, k))
    a = b.attention(q, k, v, scale=0.7, causal=True, window=2, softcap=3.0)
    x = b.add(x, b.dropout(b.reshape(a, shape=x.shape), key, rate=0.3))
    x = b.add(x, b.glu(b.linear(b.layer_norm(x, param("ln.w", 4), param("ln.b", 4), eps=1e-3), param("up", 8, 4))))
    c = b.conv(b.transpose(x, perm=(0, 2, 1)), param("kernel", 3, 4, 2), strides=(1,), low=(1,), high=(0,))
    probabilities = b.softmax(c, axis=1)
    g.set_outputs([b.reduce_mean(b.mul(probabilities, c), axes=(0, 1, 2)), probabilities], ["loss", "p"])
    return g


FEED = {
    "ids": np.array([[0, 3, 1], [4, 3, 3]]), "key": np.array([5, 6], np.uint32), "extra": np.linspace(-1, 1, 8).reshape(2, 4),
}  # fmt: skip


def test_a_model_of_everything_against_differences() -> None:
    program, _ = differentiated(everything(), Differentiate(wrt=("*", "extra")))
    g = program["gradients"]
    assert g.output_names == ["loss", "p", *(f"grad.{k}" for k in program["loss"].params), "grad.extra"]
    assert [v.type for v in g.outputs[2:-1]] == [v.type for v in program["loss"].params.values()]
    check_differences(program, FEED, "loss")
    PassManager([Cleanup(), FuseNorm(), FuseAttention(), FuseRope()], check=InterpreterCheck([{"b": 2, "s": 3}])).run(program)
    check_differences(program, FEED, "loss")


def test_twice_is_the_second_derivative() -> None:
    g = everything()
    b = Builder(g)
    program, _ = differentiated(g, Differentiate(wrt=("norm", "q.weight", "extra"), into="first"))
    first = program["first"]
    slope = first.outputs[first.output_names.index("grad.q.weight")]  # its length squared, along which there is a gradient
    b = Builder(first)
    first.set_outputs([*first.outputs, b.reduce_sum(b.mul(slope, slope), axes=(0, 1))], [*first.output_names, "grad.length"])
    differentiated(program, Differentiate("first", wrt=("table", "norm", "extra", "kernel"), of="grad.length", into="second"))
    check_differences(program, FEED, "grad.length", "second", ".of.grad.length")


def test_of_a_number() -> None:
    text = """graph @loss(%x: f64[], %y: f64[]) {
  %p: f64[] = mul(%x, %x)
  %z: f64[] = mul(%p, %y)
  return %z
}"""
    first = Differentiate(wrt=("x", "y"), into="first")
    program, _ = differentiated(text, first, Differentiate("first", ("x", "y"), "grad.x", "second"))
    g = program["second"]
    got = dict(zip(g.output_names, evaluate(g, {"x": 3.0, "y": 5.0})))
    assert got == {
        "z": 45, "grad.x": 30, "grad.y": 9, "grad.x.of.grad.x": 10, "grad.y.of.grad.x": 6,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_torch(name: str, fused: bool) -> None:
    golden = np.load(GOLDEN / "training" / f"gradients_{name}.npz")
    program = from_pretrained(GOLDEN / "hf" / name)
    if fused:
        PassManager([Cleanup(), FuseNorm(), FuseRope(), FuseAttention()]).run(program)
        assert program["forward"].count("attention")
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    PassManager([Differentiate(), Cleanup()]).run(program)
    g = program["gradients"]
    params = {k: program.params[k].load() for k in g.params}
    feed = {"tokens": golden["ids"], "labels": golden["labels"]}
    got = dict(zip(g.output_names, evaluate(g, feed, params)))
    far = dict(zip(g.output_names, spread(g, feed, params)))
    assert_allclose(got.pop("loss"), golden["loss"], rtol=1e-6)
    assert {k.removeprefix("grad.") for k in got} == set(golden) - {"ids", "labels", "loss"}
    for k, dx in got.items():
        want = golden[k.removeprefix("grad.")]
        assert_near(dx, want, bound(want, far[k]), k)


def test_what_the_output_does_not_depend_on_gets_zeros() -> None:
    text = SQUARE.replace("%w: f64[n])", "%w: f64[n], %u: f64[n, 2])")
    program, remarks = differentiated(text, Differentiate(wrt=("u", "w")))
    assert "missed: y does not depend on u: its gradient is zero (@gradients)" in remarks
    _, u, w = evaluate(program["gradients"], {"x": np.ones(3), "w": np.zeros(3), "u": np.ones((3, 2))})
    assert np.array_equal(u, np.zeros((3, 2)))  # type: ignore[arg-type]
    assert np.array_equal(w, np.ones(3))  # type: ignore[arg-type]


PARAMS = """graph @loss(%x: f32[2]) {
  param %a.weight: f32[2]
  param %a.bias: f32[2]
  param %steps: i64[]
  %y: f32[2] = mul(%x, %a.weight)
  %z: f32[2] = add(%y, %a.bias)
  %n: f32[] = cast(%steps) {dtype=f32}
  %s: f32[2] = div(%z, %n)
  %loss: f32[] = reduce_sum(%s) {axes=(0,)}
  return %loss, %s
}"""


@pytest.mark.parametrize(("wrt", "names"), [
    (("*",), ["a.weight", "a.bias"]), (("*.bias",), ["a.bias"]), (("a.bias", "*"), ["a.bias", "a.weight"]),
    (("x", "a.w*"), ["x", "a.weight"]),
])  # fmt: skip
def test_globs_choose_float_parameters(wrt: tuple[str, ...], names: list[str]) -> None:
    program, _ = differentiated(PARAMS, Differentiate(wrt=wrt))
    assert program["gradients"].output_names == ["loss", "s", *(f"grad.{n}" for n in names)]


def test_quantized_parameters_are_not_chosen() -> None:
    text = PARAMS.replace("  %y:", "  param %q: int8b4f16[3, 4]\n  %y:")
    program, _ = differentiated(text, Differentiate())
    assert program["gradients"].output_names == ["loss", "s", "grad.a.weight", "grad.a.bias"]
    with pytest.raises(PassError, match=r"q is int8b4f16\[3, 4\]: only floats have gradients"):
        differentiated(text, Differentiate(wrt=("q",)))


REFUSED = {
    "no such output": (Differentiate(of="nll"), "@loss has no output nll; there are loss, s"),
    "a vector": (Differentiate(of="s"), r"output s of @loss is f32\[2\]: only a float scalar has gradients"),
    "no such name": (Differentiate(wrt=("b.weight",)), r"b.weight chooses no float parameter .*there are x, a.weight, a.bias"),
    "inputs only by name": (Differentiate(wrt=("x*",)), r"x\* chooses no float parameter"),
    "an integer": (Differentiate(wrt=("steps",)), r"steps is i64\[\]: only floats have gradients"),
    "integers only": (Differentiate(wrt=("step*",)), r"step\* chooses no float parameter"),
    "a name taken": (Differentiate(into="loss"), "@loss exists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    change, message = REFUSED[case]
    program = random_program(PARAMS)
    with pytest.raises(PassError, match=f"pass differentiate: {message}"):
        PassManager([change]).run(program)
    assert str(program) == str(parse(PARAMS))


def test_no_such_graph() -> None:
    with pytest.raises(IRError, match="no graph @forward"):
        PassManager([Differentiate("forward")]).run(random_program(PARAMS))


def test_an_integer_output_is_refused() -> None:
    text = "graph @loss(%x: i64[]) {\n %y: i64[] = neg(%x)\n return %y\n}"
    with pytest.raises(PassError, match=r"output y of @loss is i64\[\]: only a float scalar"):
        PassManager([Differentiate(wrt=("x",))]).run(random_program(text))


def test_an_operation_without_gradient_is_named_with_its_line() -> None:
    g = Graph("loss")
    x, new, past = (g.add_input(k, parse_type(t)) for k, t in [("x", "f32[1, 4, 2]"), ("new", "f32[1, 2, 2]"), ("p", "i64[1]")])
    b = Builder(g, loc=Loc("model.py", 42))
    y = b.cache_update(x, new, past)
    b.loc = None
    g.set_outputs([b.reduce_sum(y, axes=(0, 1, 2))])
    with pytest.raises(NotDifferentiable, match=r"pass differentiate: %cache_update.*has no gradient(.|\n)*model\.py:42"):
        PassManager([Differentiate(wrt=("new",))]).run(Program({"loss": g}))
    g.replace_uses(y, Builder(g, before=y.users[0]).stop_gradient(x))
    differentiated(g, Differentiate(wrt=("new",)))  # not on the way


def test_runs_compiled() -> None:
    pytest.importorskip("tvm")
    from wasat.backends.tvm.build import Runner
    from wasat.backends.tvm.targets import target_named

    golden = np.load(GOLDEN / "training" / "gradients_llama.npz")
    program = from_pretrained(GOLDEN / "hf" / "llama")
    add_loss(
        program,
        lambda b, v: cross_entropy(b, v["logits"], v["labels"], smoothing=0.1, z_loss=0.1),
        {"labels": "i64[b, s]"},
    )
    PassManager([Cleanup(), FuseNorm(), FuseRope(), FuseAttention(), Differentiate(), Cleanup()]).run(program)
    g = program["gradients"]
    feed = {"tokens": golden["ids"], "labels": golden["labels"]}
    params = {k: program.params[k].load() for k in g.params}
    want, far = (dict(zip(g.output_names, f(g, feed, params))) for f in (evaluate, spread))
    got = Runner(Program({"gradients": g}, program.params), target_named("cpu"))("gradients", feed)
    assert set(got) == set(want)
    for k, x in want.items():
        assert_near(got[k], x, bound(x, far[k]), k)


def test_verified() -> None:
    program, _ = differentiated(everything(), Differentiate())
    verify(program["gradients"])
