"""The weights file: packed piece by piece, its bytes are those of the whole; layouts that lie are caught."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from wasat.backends.tvm import weights
from wasat.backends.tvm.cpu.kernels.isa import AVX2, AVX512_VNNI
from wasat.backends.tvm.cpu.panels import PaddedBias, Panels
from wasat.backends.tvm.layouts import Layout, Packed, Plain
from wasat.backends.tvm.lower import WeightPlan
from wasat.backends.tvm.ops.quantized import PlainQuantized
from wasat.ir import Array, IRError, QTensorType, TensorType, type_of
from wasat.ir.ops.quant import quantize_array

RNG = np.random.default_rng(0)


def matrix(n: int, k: int, scheme: str | None = None) -> Array:
    x = RNG.standard_normal((n, k)).astype(np.float32)
    return x if scheme is None else quantize_array(x, QTensorType(scheme, (n, k)))


CASES: list[tuple[Layout, Array]] = [
    (Plain(), matrix(37, 5)),
    (Plain(), np.float32(3.0) * np.ones((), np.float32)),
    (Plain(), np.zeros((0, 4), np.float32)),
    (PlainQuantized(), matrix(37, 70, "int4")),
    (PlainQuantized(), matrix(37, 70, "int8")),
    (Panels(AVX2, "float32"), matrix(37, 70)),
    (Panels(AVX512_VNNI, "float16"), matrix(129, 70)),
    (Panels(AVX512_VNNI, "int4"), matrix(129, 70, "int4")),
    (Panels(AVX2, "int8"), matrix(129, 64, "int8")),
    (PaddedBias(AVX512_VNNI), RNG.standard_normal(37).astype(np.float32)),
]


@pytest.mark.parametrize("layout, weight", CASES)
@pytest.mark.parametrize("piece", [1, 3000, 1 << 20])
def test_pieces_make_the_whole(layout: Layout, weight: Array, piece: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "_PIECE", piece)
    plan = WeightPlan()
    plan.add("g", "w", layout, layout.arrays("w", type_of(weight)))
    seen: list[tuple[int, int]] = []
    weights.write_weights(tmp_path / "w", plan, {"w": weight}.__getitem__, lambda *done: seen.append(done))
    found = load_file(tmp_path / "w")
    whole = layout.pack(weight)
    assert sorted(found) == sorted(a.name for a in plan.arrays)
    for a, x in zip(plan.arrays, whole):
        np.testing.assert_array_equal(found[a.name], x)
    assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in whole)


@dataclass(frozen=True)
class Wrong(Plain):
    """Says one thing and makes another."""

    how: str = ""

    def arrays(self, name: str, type: Any) -> list[Packed]:
        (a,) = super().arrays(name, type)
        return [Packed(a.name, a.dtype, (a.shape[0] + 1, a.shape[1]))] if self.how == "rows" else [a]

    def pack(self, weight: Any) -> list[np.ndarray]:
        return [weight.astype(np.float64) if self.how == "dtype" else weight[:, 1:] if self.how == "columns" else weight]


@pytest.mark.parametrize("how", ["rows", "columns", "dtype"])
def test_layouts_that_lie_are_caught(how: str, tmp_path: Path) -> None:
    plan = WeightPlan()
    w = np.ones((4, 3), np.float32)
    wrong: Any = Wrong(how)
    plan.add("g", "w", wrong, wrong.arrays("w", TensorType("f32", (4, 3))))
    with pytest.raises(IRError, match="packing w made"):
        weights.write_weights(tmp_path / "w", plan, {"w": w}.__getitem__)
