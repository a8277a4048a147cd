"""The bound of what rounding may move: sums in another order are within it, faults of small elements are not."""

from __future__ import annotations

import numpy as np
import pytest
from rounding import assert_near, bound, spread
from wasat.ir import parse

GRAPH = parse("""graph @f(%x: f32[n, k], %w: f32[k, 4]) {
  %p: f32[n, 4] = matmul(%x, %w)
  %e: f32[n, 4] = exp(%p)
  %m: f32[n, 4] = mul(%e, %p)
  %i: bool[n, 4] = greater(%p, 0.0:f32)
  return %m, %i
}""")


def given() -> dict[str, np.ndarray]:
    """Rows of 10^-4 to 1; the last column of w cancels."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((5, 300)) * 10.0 ** np.arange(-4, 1)[:, None] / 20).astype(np.float32)
    w = rng.standard_normal((300, 4)).astype(np.float32)
    w[1::2, 3] = -w[::2, 3]
    x[:, 1::2] = x[:, ::2] * (1 + 1e-5 * rng.standard_normal((5, 150))).astype(np.float32)
    return {"x": x, "w": w}


def test_another_order_is_within_and_a_small_fault_is_not() -> None:
    feed = given()
    x, w = feed["x"], feed["w"]
    p = np.array([[sum((x[i] * w[:, j])[::-1], np.float32(0)) for j in range(4)] for i in range(5)])  # one by one, in f32
    exact = x.astype(np.float64) @ w.astype(np.float64)
    far = spread(GRAPH, feed)
    want = np.exp(exact) * exact
    allowed = bound(want.astype(np.float32), far[0])
    assert_near((np.exp(p) * p).astype(np.float32), want, allowed)
    assert (np.abs(p - exact)[:, 3] > 1e-4 * np.abs(exact)[:, 3]).any()  # digits are lost where terms cancel
    assert (allowed[:, :3] < 1e-3 * np.abs(want[:, :3])).all()
    for i, j in np.ndindex(5, 3):
        wrong = want.copy()
        wrong[i, j] *= 1.001  # of the smallest row: 10^-7 of the largest element
        with pytest.raises(AssertionError, match=rf"1 of 20 elements; \[{i}, {j}\] is"):
            assert_near(wrong, want, allowed)
    assert not far[1].any()


def test_what_jumps_and_what_is_no_number() -> None:
    g = parse("""graph @f(%x: f32[6]) {
      %a: f32[6] = floor(%x)
      %b: f32[6] = mul(%x, 2.0:f32)
      %t: f32[2], %i: i64[2] = top_k(%b) {k=2}
      return %a, %b, %t, %i
    }""")
    x = np.array([1, -np.inf, np.nan, 2.5, 0, 2.4999998], np.float32)
    a, b, _, i = spread(g, {"x": x})
    assert not a.any()
    assert (b > 0).tolist() == [False, False, False, True, False, True]  # whole numbers are exact
    assert not i.any()
    assert not bound(np.array([3, 4]), i).any()
    want = x * 2
    allowed = bound(want, b)
    assert_near(want, want, allowed)
    for at, wrong in ((1, np.inf), (1, -1e30), (2, 1.0), (3, np.nan), (4, 1e-30)):
        bad = want.copy()
        bad[at] = wrong
        with pytest.raises(AssertionError, match=rf"\[{at}\] is"):
            assert_near(bad, want, allowed)
