"""nn.einsum against np.einsum on random patterns, and its groups, repeats and errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from wasat.frontend import nn
from wasat.ir import TypeMismatch, evaluate, verify

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 1}


class Sum(nn.Module):
    def __init__(self, pattern: str, **sizes: int) -> None:
        self.pattern, self.sizes = pattern, sizes

    def __call__(self, **xs: nn.Tensor) -> nn.Tensor:
        return nn.einsum(self.pattern, *xs.values(), **self.sizes)


def check(pattern: str, arrays: list[np.ndarray], symbolic: list[str], **sizes: int) -> np.ndarray:
    program = nn.trace(Sum(pattern, **sizes), {f"x{i}": f"f64[{t}]" for i, t in enumerate(symbolic)})
    verify(program["forward"])
    return evaluate(program["forward"], {f"x{i}": x for i, x in enumerate(arrays)})[0]


axes = st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True)


@given(st.lists(axes, min_size=1, max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_equals_numpy(operands: list[list[str]], data: st.DataObject) -> None:
    every = sorted({n for axes in operands for n in axes})
    out = data.draw(st.permutations(data.draw(st.lists(st.sampled_from(every), unique=True))))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([SIZES[n] for n in axes]) for axes in operands]
    want = np.einsum(",".join("".join(a) for a in operands) + "->" + "".join(out), *arrays)
    pattern = ", ".join(" ".join(a) for a in operands) + " -> " + " ".join(out)
    fixed = [", ".join(str(SIZES[n]) for n in a) for a in operands]
    assert_allclose(check(pattern, arrays, fixed), want, rtol=1e-10, atol=1e-12)
    symbolic = [", ".join("1" if n == "e" else n for n in a) for a in operands]
    assert_allclose(check(pattern, arrays, symbolic), want, rtol=1e-10, atol=1e-12)


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape)


def test_grouped_queries() -> None:
    q, k = rand(2, 5, 6, 4), rand(2, 7, 3, 4)
    got = check("b s (g r) d, b t g d -> b (g r) s t", [q, k], ["b, s, 6, 4", "b, t, 3, 4"])
    assert_allclose(got, np.einsum("bshd,bthd->bhst", q, np.repeat(k, 2, axis=2)))


def test_split_and_merge() -> None:
    x = rand(2, 5, 12)
    got = check("b s (h d) -> b h s d", [x], ["b, s, 12"], h=3)
    assert_allclose(got, x.reshape(2, 5, 3, 4).swapaxes(1, 2))
    assert_allclose(check("b h s d -> b s (h d)", [got], ["b, 3, s, 4"]), x)


def test_repeat_ellipsis_and_ones() -> None:
    x = rand(2, 5)
    assert_allclose(check("b d -> b n d", [x], ["b, 5"], n=3), np.repeat(x[:, None], 3, axis=1))
    assert_allclose(check("... d -> d ...", [rand(2, 3, 5)], ["2, 3, 5"]), np.moveaxis(rand(2, 3, 5), -1, 0))
    assert_allclose(check("... s d, ... t d -> ... s t", [x, x], ["s, 5", "t, 5"]), x @ x.T)
    assert_allclose(check("b 1 d -> b d 1", [x[:, None]], ["b, 1, 5"]), x[:, :, None])


def test_a_wide_weight_makes_one_matrix_product() -> None:
    program = nn.trace(Sum("b s k, k h d -> b s h d"), {"x": "f32[b, s, 8]", "w": "f32[8, 2, 4]"})
    (product,) = [n for n in program["forward"].nodes if n.op.name == "matmul"]
    assert str(product.output.type) == "f32[b, s, 8]"


def test_the_larger_side_is_not_transposed() -> None:
    pattern = "b (g r) s t, b t g e -> b s (g r) e"
    program = nn.trace(Sum(pattern), {"p": "f32[b, 4, s, t]", "v": "f32[b, t, 2, 8]"})
    transposed = [n.inputs[0] for n in program["forward"].nodes if n.op.name == "transpose"]
    assert [str(v.type) for v in transposed] == ["f32[b, t, 2, 8]", "f32[b, 2, 2, s, 8]"]


@pytest.mark.parametrize(
    "pattern, types, sizes, message",
    [
        ("b s d", ["b, s, 4"], {}, "has no '->'"),
        ("b s, b t -> b", ["b, s"], {}, "describes 2 operands, 1 are given"),
        ("b s -> b", ["b, s, 4"], {}, "names 2 axes of an operand that has 3"),
        ("bij, bkj -> bik", ["b, s, 4", "b, t, 4"], {}, "names 1 axes of an operand that has 3; axes stand apart, 'b i j'"),
        ("s d, t d -> s t", ["s, 4", "t, 8"], {}, "axis d is 4 and, in operand 2 %x1: f64[t, 8], 8"),
        ("b d -> b d n", ["b, 4"], {}, "give its size: n="),
        ("b (h d) -> b h d", ["b, 12"], {}, "the sizes of h and d"),
        ("b (h d) -> b h d", ["b, 12"], {"h": 5}, "has size 12, which h=5, d=2 does not make"),
        ("b b -> b", ["b, b"], {}, "axis b appears twice"),
        ("b (h d -> b", ["b, 12"], {}, "a ( is not closed"),
        ("b ? -> b", ["b, 12"], {}, "cannot read '?"),
        ("b 1 -> b", ["b, 12"], {}, "is written 1 and has size 12"),
    ],
)
def test_errors_say_what_is_wrong(pattern: str, types: list[str], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(TypeMismatch) as e:
        nn.trace(Sum(pattern, **sizes), {f"x{i}": f"f64[{t}]" for i, t in enumerate(types)})
    assert message in str(e.value)
    assert repr(pattern) in str(e.value)
    assert "nn.einsum(self.pattern" in str(e.value)  # the user's line
