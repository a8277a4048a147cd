"""Every block of the attention zoo traces, prints, parses back, and computes what its description says."""

from __future__ import annotations

import numpy as np
import pytest
from attention_zoo import CASES, HEAD_DIM, HEADS, MORE, Case
from numpy.testing import assert_allclose
from wasat.frontend import nn
from wasat.ir import evaluate, parse, verify


def reference(case: Case, p: dict[str, np.ndarray], x: np.ndarray, extra: dict[str, np.ndarray]) -> np.ndarray:
    """The block in float64 from the case's own attributes."""
    w = {k: v.astype(np.float64) for k, v in p.items()}
    x = x.astype(np.float64)
    b, s, _ = x.shape
    q, k, v = ((x @ w[f"{n}.weight"].T).reshape(b, s, -1, HEAD_DIM) for n in "qkv")
    if case.norms:
        q, k = (t / np.sqrt((t * t).mean(-1, keepdims=True) + 1e-6) * w[f"{n}_norm.weight"] for n, t in (("q", q), ("k", k)))
    if case.ropes:
        angle = np.arange(s)[:, None, None] * nn.frequencies(HEAD_DIM).astype(np.float64)
        c, n = np.cos(angle), np.sin(angle)
        half = HEAD_DIM // 2
        q, k = (
            np.concatenate(
                [t[..., :half] * c - t[..., half:] * n, t[..., half:] * c + t[..., :half] * n], -1
            )
            for t in (q, k)
        )  # fmt: skip
    k, v = (np.repeat(t, HEADS // case.kv_heads, axis=2) for t in (k, v))
    scores = np.einsum("bshd,bthd->bhst", q, k) * case.scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    scores = scores + extra.get("bias", 0.0)
    i, j = np.arange(s)[:, None], np.arange(s)[None]
    keep = (j <= i) if case.causal else np.ones((s, s), bool)
    keep = keep & (i - j < (case.window or s))
    keep = keep & extra["real"][:, None, None, :] if "real" in extra else keep
    e = np.where(keep, np.exp(scores), 0)
    total = e.sum(-1, keepdims=True)
    if case.sink:  # a logit that no value has
        total = total + np.exp(w["sink"])[:, None, None]
    out = np.einsum("bhst,bthd->bshd", e / total, v)
    return out.reshape(b, s, -1) @ w["o.weight"].T


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
@pytest.mark.parametrize("b, s", [(1, 1), (2, 9)])
def test_blocks_compute_what_they_say(case: Case, b: int, s: int) -> None:
    program = case.build()
    graph = program["forward"]
    verify(graph)
    assert str(parse(str(graph))) == str(graph)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((b, s, 32)).astype(case.dtype.replace("f", "float"))
    extra: dict[str, np.ndarray] = {}
    if "real" in case.inputs:
        extra["real"] = np.arange(s)[None] < rng.integers(1, s + 1, (b, 1))
    if "bias" in case.inputs:
        extra["bias"] = rng.standard_normal((s, s)).astype(np.float32)
    p = {k: v.load() for k, v in program.params.items()}
    got = evaluate(graph, {"x": x, **extra}, p)[0]
    want = reference(case, p, x, extra)
    assert got.dtype == x.dtype
    tolerance = {"f32": 1e-5, "f16": 4e-3}[case.dtype]
    assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_the_nine_variants_are_there() -> None:
    assert len(CASES) == 9
