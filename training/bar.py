"""How far a run is, on stderr: a bar, or where that is no terminal a line now and then."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINES = 10
"""At least so many lines, where there is no bar, for a whole run."""


class Bar:
    """Steps, loss, tokens per second, utilisation and how many updates were skipped, in one line that is written anew.

    Where ``console`` (default: stderr) is no terminal, a plain line for the first step, every tenth of them, each evaluation.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling the step", total=None)
        self._skipped = 0
        self._begun = False
        self._bar.start()
        if not self._console.is_terminal:
            self._say("compiling the step")

    def __call__(self, step: int, steps: int, said: Mapping[str, float]) -> None:
        """Of the ``said``, shows loss, tokens_per_second, utilisation, skipped, and in lines eval.loss."""
        self._skipped += bool(said.get("skipped"))
        speed = f"{said['tokens_per_second']:7.0f} tokens/s  {said['utilisation']:5.1%} of peak"
        skipped = f"  {self._skipped} skipped" if self._skipped else ""
        self._bar.update(self._task, completed=step, total=steps, description=f"loss {said['loss']:.4f}  {speed}{skipped}")
        due = not self._begun or step == steps or step % max(steps // _LINES, 1) == 0 or "eval.loss" in said
        self._begun = True
        if due and not self._console.is_terminal:
            held_out = f"  held out {said['eval.loss']:.4f}" if "eval.loss" in said else ""
            self._say(f"step {step}/{steps}  loss {said['loss']:.4f}{held_out}  {speed}{skipped}")

    def _say(self, line: str) -> None:
        print(line, file=self._console.file, flush=True)

    def close(self) -> None:
        self._bar.stop()
