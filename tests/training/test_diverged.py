"""A run that meets what is not finite stops, and names the step, the node and the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loop import Fixed, untimed
from wasat.ir import ArrayParam, Builder, Program, TensorType, Value, parse, type_of
from wasat.training.checkpoint import Checkpoints
from wasat.training.data import Batch
from wasat.training.divergence import Diverged, offender
from wasat.training.loop import Trained, train
from wasat.training.optimizers import SGD, Constant
from wasat.training.scaling import LossScale

from wasat import nn

pytestmark = pytest.mark.usefixtures("compiled_once")

BY_NODE = r"the first NaN was made by %log\w*: .* = log\(.*test_diverged\.py:\d+"


class Logarithm(nn.Module):
    def __init__(self) -> None:
        self.w = nn.Parameter([3])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.log(x * 1.0).sum() + self.w.sum()


def test_a_nan_stops_with_the_node(tmp_path: Path) -> None:
    p = nn.trace(Logarithm(), {"x": "f32[n]"}, name="loss", outputs=["loss"])
    with pytest.raises(Diverged, match=rf"step 1: the loss is nan.*{BY_NODE}"):
        train(p, Fixed({"x": np.array([1, -1, 1], np.float32)}), tmp_path, steps=3, progress=lambda *a: None)
    assert not Checkpoints(tmp_path).steps()
    with pytest.raises(Diverged, match="input %x held an infinity already"):
        train(p, Fixed({"x": np.array([1, np.inf, 1], np.float32)}), tmp_path, steps=3, progress=lambda *a: None)


class Rows(nn.Module):
    """The sum of some rows of every parameter."""

    def __init__(self, count: int) -> None:
        self.w = [nn.Parameter([3, 2]) for _ in range(count)]

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.concat([nn.gather(w, x) for w in self.w], axis=0).sum()


class Signs:
    """Each number moves by the rate against its gradient's sign, which it finds in a bad way: of 0 it is NaN."""

    def slots(self, p: Value) -> dict[str, TensorType]:
        return {}

    def update(
        self, b: Builder, p: Value, g: Value, slots: dict[str, Value], rate: Value, count: Value
    ) -> tuple[Value, dict[str, Value]]:  # fmt: skip
        return b.sub(p, b.mul(b.div(g, b.abs(g)), rate)), {}


@pytest.mark.parametrize("count, names", [(3, "w.0, w.1, w.2"), (4, "w.0, w.1, w.2, …")])
def test_an_update_that_spoils_what_the_loss_does_not_see(tmp_path: Path, count: int, names: str) -> None:
    p = nn.trace(Rows(count), {"x": "i64[n]"}, name="loss", outputs=["loss"])
    with pytest.raises(Diverged, match=f"step 2: {re.escape(names)} hold what is not finite, and loss and gradients do not"):
        train(
            p, Fixed({"x": np.array([0, 2])}), tmp_path, steps=3, optimizer=Signs(), rate=Constant(0.1), save_every=2,
            progress=lambda *a: None,
        )  # fmt: skip
    assert not Checkpoints(tmp_path).steps()


class Fragile(nn.Module):
    """log(x w) and masked logarithms of ``fixed``, whose NaN do not matter."""

    def __init__(self) -> None:
        self.w, self.fixed = nn.Parameter([4, 4]), nn.Parameter([4])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        masked = nn.where(self.fixed > 0, nn.log(self.fixed * 1.0), 0.0)
        return nn.log(x @ self.w).sum() + (masked * x).sum() + self.fixed.sum()


class Spoilt:
    """Batches of ones, but for one number in the third."""

    def __init__(self, number: float) -> None:
        self.number, self.at = number, 0

    def __next__(self) -> Batch:
        self.at += 1
        return {"x": np.array([[1, 1, 1, self.number if self.at == 3 else 1]], np.float32)}

    def state(self) -> int:
        return self.at

    def restore(self, state: int) -> None:
        self.at = state




STOPPED: dict[str, tuple[float, dict[str, Any], str]] = {
    "f32": (-9.0, {}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "remat": (-9.0, {"remat": True}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "between updates": (-9.0, {"accumulate": 4}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "bf16": (-9.0, {"precision": "bf16"}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "f16": (-9.0, {"precision": "f16"}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "f16 between updates": (-9.0, {"precision": "f16", "accumulate": 4}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "data": (np.nan, {}, "step 3: the loss is nan.*; input %x held NaN already"),
    "data in f16": (np.inf, {"precision": "f16", "accumulate": 2}, "step 3: the loss is .*; input %x held an infinity already"),
    "a trained parameter": (1.0, {"w": np.nan}, "step 1: the loss is nan.*; input %w held NaN already"),
    "a parameter": (1.0, {"fixed": np.inf}, "step 1: the loss is inf.*; parameter %fixed held an infinity already"),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_is_not_finite_is_named_with_its_step(tmp_path: Path, case: str) -> None:
    number, options, message = STOPPED[case]
    p = nn.trace(Fragile(), {"x": "f32[n, 4]"}, name="loss", outputs=["loss"])
    values = {"w": np.full((4, 4), 0.25, np.float32), "fixed": np.array([1, 2, -1, 0], np.float32)}
    options = dict(options)
    for k, x in values.items():
        x.flat[0] = options.pop(k, x.flat[0])
        p.params[k] = ArrayParam(x, type_of(x))
    with pytest.raises(Diverged, match=message):
        train(
            p, Spoilt(number), tmp_path, steps=5, optimizer=SGD(), rate=Constant(1e-3), train=("w",),
            progress=lambda *a: None, **options,
        )  # fmt: skip
    steps = [json.loads(t)["step"] for t in (tmp_path / "log.jsonl").read_text().splitlines()] if number != 1 else []
    assert steps == list(range(1, 1 + 2 * (number != 1)))


class Steep(nn.Module):
    """A sum, through numbers ``slope`` squared times as steep."""

    def __init__(self, slope: float) -> None:
        self.w, self.slope = nn.Parameter([1, 4]), slope

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return ((x @ self.w.transpose(1, 0)) * self.slope * self.slope).sum()


def test_an_overflow_in_f16_is_skipped_and_says_so(tmp_path: Path) -> None:
    x = Fixed({"x": np.full((1, 4), 2.0**-10, np.float32)})

    def steep(slope: float) -> Program:
        return nn.trace(Steep(slope), {"x": "f32[n, 4]"}, name="loss", outputs=["loss"])

    def go(p: Program, folder: str, steps: int) -> Trained:
        return train(
            p, x, tmp_path / folder, steps=steps, optimizer=SGD(), rate=Constant(1e-3), precision="f16", remat=True,
            scaling=LossScale(4.0, interval=2), progress=lambda *a: None,
        )  # fmt: skip

    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    first = go(steep(2.0**7), "steep", 2)
    done = go(steep(2.0**7), "steep", 6)
    assert untimed(done.log[:2]) == untimed(first.log)
    lines = (tmp_path / "steep" / "log.jsonl").read_text().splitlines()
    written = [json.loads(t, parse_constant=no_json)["grad_norm"] for t in lines]
    assert written[:2] == ["Infinity", done.log[1]["grad_norm"]]
    assert [float(x) for x in written] == [line["grad_norm"] for line in done.log]
    assert [line["skipped"] for line in done.log] == [1, 0, 0, 1, 0, 0]
    assert [line["loss_scale"] for line in done.log] == [4, 2, 2, 4, 2, 2]
    assert done.states["optimizer.skipped"] == 2
    assert any("backward pass" in str(r) for r in done.remarks)
    with pytest.raises(Diverged, match=r"step 3: .*the gradients' norm inf; the first infinity was made by %\w+"):
        go(steep(2.0**9), "steeper", 9)


def test_infinities_of_masks_are_not_blamed() -> None:
    g = parse("""graph @g(%x: f32[2], %m: bool[2]) {
  %low: f32[2] = select(%m, %x, -inf:f32)
  %e: f32[2] = exp(%low)
  %big: f32[2] = mul(%x, 1e38:f32)
  %y: f32[2] = mul(%big, %e)
  return %y
}""")
    x = {"x": np.array([9.0, 9.0], np.float32), "m": np.array([True, False])}
    assert re.search(r"the first infinity was made by %big", offender(g, x, {}, "y"))  # type: ignore[arg-type]
    assert "stays finite" in offender(g, {**x, "x": np.ones(2, np.float32)}, {}, "y")  # type: ignore[arg-type]


def test_of_what_is_all_masked_the_node_is_blamed_and_not_the_constant() -> None:
    g = parse("""graph @g(%x: f32[2], %m: bool[2]) {
  %low: f32[2] = select(%m, %x, -inf:f32)
  %y: f32[2] = softmax(%low) {axis=0}
  return %y
}""")
    x = {"x": np.ones(2, np.float32), "m": np.zeros(2, bool)}
    assert "the first NaN was made by %y: f32[2] = softmax(%low)" in offender(g, x, {}, "y")  # type: ignore[arg-type]
