"""Training with rounded weights (``ws.train(quantize=)``): what is logged, kept and served."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from wasat.ir import CheckpointError, Program
from wasat.passes import HoistParams, PassManager, Quantize
from wasat.training.data import Batch
from wasat.training.loop import Trained, train
from wasat.training.optimizers import AdamW, Cosine

import wasat as ws
from wasat import nn

RNG = np.random.default_rng(0)
MADE = RNG.standard_normal((4, 64)).astype(np.float32)
WANTED = RNG.standard_normal((4, 8)).astype(np.float32)


def student() -> Program:
    p = nn.trace(nn.Sequential(nn.Linear(64, 8)), {"x": "f32[n, 64]"}, outputs=["y"])
    nn.add_loss(p, lambda y, target: nn.mse(y, target), {"target": "f32[n, 8]"})
    return p


def batches(seed: int) -> Iterator[Batch]:
    """Features that say four things in 64 ways: many weights mean the same, and some of these are near what four bits hold."""
    rng = np.random.default_rng(seed)
    while True:
        z = rng.standard_normal((64, 4)).astype(np.float32)
        yield {"x": z @ MADE, "target": z @ WANTED}


def held_out() -> list[Batch]:
    return list(islice(batches(9), 8))


def run(folder: Path, steps: int, quantize: str | None) -> Trained:
    return train(
        student(), batches(1), folder, steps=steps, optimizer=AdamW(), rate=Cosine(0.01, steps=steps), quantize=quantize,
        evaluation=held_out, evaluate_every=steps,
    )  # fmt: skip


def served(program: Program, scheme: str) -> float:
    """The loss over what was held out, of the program with its weights stored in fewer bits."""
    program = program.copy()
    PassManager([Quantize(scheme, None), HoistParams()]).run(program)
    return float(np.mean([ws.run(program, "loss", **b)["loss"] for b in held_out()]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Trained]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, {q: run(folder / str(q), 300, q) for q in (None, "int4-plain")}


def test_what_is_evaluated_is_what_is_served(runs: tuple[Path, dict[str | None, Trained]]) -> None:
    done = runs[1]["int4-plain"]
    assert str(done.remarks[0]) == "applied: 1 weight rounded to int4-plain (@loss)"
    assert done.log[-1]["eval.loss"] == pytest.approx(served(done.program, "int4-plain"), rel=2e-6)
    assert not any(g.count("fake_quantize") for g in done.program.graphs.values())
    wide = np.asarray(done.program.params["0.weight"].load())
    assert len(np.unique(wide)) > 500  # what is kept is not rounded
    assert [t.program.origin.rounded for t in runs[1].values()] == [None, "int4-plain"]


def test_it_loses_less_than_rounding_after_training(runs: tuple[Path, dict[str | None, Trained]]) -> None:
    plain, rounded = runs[1][None], runs[1]["int4-plain"]
    assert served(rounded.program, "int4-plain") < 0.3 * served(plain.program, "int4-plain")


def test_a_run_of_another_scheme_is_refused(runs: tuple[Path, dict[str | None, Trained]]) -> None:
    with pytest.raises(CheckpointError, match="holds another run: quantize was int4-plain, and is int8; choose another folder"):
        run(runs[0] / "int4-plain", 300, "int8")
