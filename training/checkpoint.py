"""Checkpoints of a training run: safetensors files, complete or absent; the last few and the best are kept."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from wasat.ir import WasatError

_NAME = re.compile(r"step-(\d+)\.safetensors\Z")


class CheckpointError(WasatError):
    """A checkpoint that is damaged, that belongs to another run, or that cannot be written."""


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written that gets its name, ``path``, once all of it is on the disk; until then an older one stays.

    Raises CheckpointError where the system refuses, as when the disk is full, and leaves no part behind.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is on the disk
        finally:
            os.close(folder)
    except OSError as e:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {e.strerror}") from e


@dataclass(frozen=True)
class Checkpoint:
    """What a run was at one moment. ``more`` is the caller's own, JSON: where its data stand, its seed."""

    step: int
    states: dict[str, np.ndarray]
    score: float | None
    more: Any


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in ``folder``: the last ``keep``, and the one of the lowest score."""

    folder: Path
    keep: int = 3

    def save(self, step: int, states: Mapping[str, np.ndarray], *, score: float | None = None, more: Any = None) -> Path:
        """Writes the checkpoint of ``step`` and drops those no longer kept; a kill at any moment leaves the earlier ones.

        Raises CheckpointError where it cannot be written; the earlier ones stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {k: np.asarray(v, order="C") for k, v in states.items()}
        data = save(arrays, {"wasat": json.dumps({"step": step, "score": score, "more": more})})
        path = self._path(step)
        with whole(path) as f:
            f.write(data)
        self._drop()
        return path

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in order."""
        found = (_NAME.match(p.name) for p in self.folder.glob("step-*"))
        return sorted(int(m[1]) for m in found if m)

    def best(self) -> int | None:
        """The step of the lowest score that is a number, the first of equals; None if no checkpoint has one."""
        scores = {step: self._about(step)["score"] for step in self.steps()}
        return min((s for s, x in scores.items() if x is not None and not math.isnan(x)), key=lambda s: scores[s], default=None)

    def more(self) -> Any:
        """What the latest checkpoint holds as ``more``; None if there is none yet."""
        return self._about(self.steps()[-1])["more"] if self.steps() else None

    def load(self, like: Mapping[str, np.ndarray], step: int | None = None) -> Checkpoint | None:
        """The checkpoint of ``step``, by default the latest; None if there is none yet.

        Raises CheckpointError if it is damaged, or its states are not those of ``like`` by name, element type and shape.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        step = steps[-1] if step is None else step
        about = self._about(step)
        with self._open(step) as f:
            states = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no mapping)
        for k in sorted(states.keys() | like.keys()):
            here, there = (f"{x[k].dtype}{list(x[k].shape)}" if k in x else "absent" for x in (like, states))
            if here != there:
                raise CheckpointError(f"{self._path(step)} is of another run: state {k} is {there} in it, and {here} here")
        return Checkpoint(step, {k: states[k] for k in like}, about["score"], about["more"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _open(self, step: int) -> Any:
        try:
            return safe_open(self._path(step), "np")
        except FileNotFoundError:
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are {there}") from None
        except SafetensorError as e:
            raise CheckpointError(f"{self._path(step)} is damaged: {e}; remove it to go on from the one before") from None

    def _about(self, step: int) -> dict[str, Any]:
        with self._open(step) as f:
            metadata = f.metadata() or {}
        if "wasat" not in metadata:
            raise CheckpointError(f"{self._path(step)} is no checkpoint of a training run")
        about: dict[str, Any] = json.loads(metadata["wasat"])
        return about

    def _drop(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                self._path(step).unlink()
        for p in self.folder.glob("step-*.unfinished"):  # of runs that were killed
            p.unlink()
