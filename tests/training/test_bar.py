"""How far a run is: a bar on a terminal; elsewhere plain lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from wasat.training.bar import Bar

SAID = {"loss": 2.5, "tokens_per_second": 1234.0, "utilisation": 0.125}


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=120))
    bar(1, 40, SAID)
    bar.close()
    shown = out.getvalue()
    assert "\x1b[" in shown
    for text in ("loss 2.5000", "1234 tokens/s", "12.5% of peak", "1/40"):
        assert text in shown
    assert "skipped" not in shown


def test_the_bar_counts_skipped_updates() -> None:
    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=120))
    for step, skipped in enumerate((1.0, 0.0, 1.0, 0.0), 1):
        bar(step, 40, {**SAID, "skipped": skipped, "loss_scale": 4.0})
    bar.close()
    assert "2 skipped" in out.getvalue()
    assert "4/40" in out.getvalue()


def lines(steps: int, first: int = 1, evaluated: int | None = None) -> list[str]:
    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=False, width=20))
    for step in range(first, steps + 1):
        bar(step, steps, {**SAID, "skipped": float(step == 2), **({"eval.loss": 3.0} if step == evaluated else {})})
    bar.close()
    assert not [c for c in out.getvalue() if c != "\n" and not c.isprintable()]
    return out.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    first, *told = lines(200, evaluated=77)
    assert first == "compiling the step"
    assert [int(t.split()[1].split("/")[0]) for t in told] == [1, 20, 40, 60, 77, 80, 100, 120, 140, 160, 180, 200]
    assert told[0] == "step 1/200  loss 2.5000     1234 tokens/s  12.5% of peak"
    assert told[4] == "step 77/200  loss 2.5000  held out 3.0000     1234 tokens/s  12.5% of peak  1 skipped"


@pytest.mark.parametrize(
    ("steps", "first", "told"), [(1, 1, ["1/1"]), (3, 1, ["1/3", "2/3", "3/3"]), (50, 48, ["48/50", "50/50"])]
)
def test_lines_of_short_and_of_resumed_runs(steps: int, first: int, told: list[str]) -> None:
    assert [t.split()[1] for t in lines(steps, first)[1:]] == told
