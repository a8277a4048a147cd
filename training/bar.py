"""The progress bar of a run, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Steps, loss, tokens per second and utilisation in one line; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("compiling the step", total=None)
        self._bar.start()

    def __call__(self, step: int, steps: int, said: Mapping[str, float]) -> None:
        """Of the ``said``, shows loss, tokens_per_second and utilisation."""
        speed = f"{said['tokens_per_second']:7.0f} tokens/s  {said['utilisation']:5.1%} of peak"
        self._bar.update(self._task, completed=step, total=steps, description=f"loss {said['loss']:.4f}  {speed}")

    def close(self) -> None:
        self._bar.stop()
