"""Checkpoints of a training run: safetensors files, complete or absent; the last few and the best are kept."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from wasat.ir import CheckpointError

_TYPES = {"bool": "BOOL", "bfloat16": "BF16"} | {
    f"{word}{bits}": f"{letter}{bits}" for word, letter in (("int", "I"), ("uint", "U"), ("float", "F"))
    for bits in (8, 16, 32, 64)
    if (word, bits) != ("float", 8)
}  # fmt: skip
"""What the format calls an element type, by NumPy's name."""
_NAME = re.compile(r"step-(\d+)\.safetensors\Z")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def save(self, step: int, states: Mapping[str, np.ndarray], *, score: float | None = None, more: Any = None) -> Path:
        """Writes the checkpoint of ``step`` and drops those no longer kept; a kill at any moment leaves the earlier ones.

        Raises CheckpointError where it cannot be written; the earlier ones stay.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError(f"step is {step!r}; it must be a whole number, 0 or above")
        path, states = self._path(step), {k: _own_order(x) for k, x in states.items()}
        if "__metadata__" in states:
            raise CheckpointError(f"{path} cannot be written: the format has no state named __metadata__")
        for k, x in states.items():
            if x.dtype.name not in _TYPES:
                raise CheckpointError(f"{path} cannot be written: state {k} is {x.dtype}, which the format lacks")
        try:
            for key in _keys(more):
                if not isinstance(key, str):  # JSON would make one of it, and read it as one
                    raise TypeError(f"what it holds beside states has the key {key!r}, which is no text")
            about = json.dumps({"step": step, "score": score, "more": more, "states": _digest(states)})
        except (TypeError, ValueError, RecursionError) as e:  # a name that is no Unicode is a ValueError
            raise CheckpointError(f"{path} cannot be written: {e}") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as e:  # a file, a name that no folder has
            raise CheckpointError(f"{self.folder} can be no folder of checkpoints: {e}") from None
        header: dict[str, Any] = {"__metadata__": {"wasat": about, "sha256": sha256(about.encode()).hexdigest()}}
        order, end = sorted(states, key=lambda k: (-states[k].dtype.itemsize, k)), 0  # so that every array is aligned
        for k in order:
            x = states[k]
            header[k] = {"dtype": _TYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
            end += x.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with replacing(path) as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for k in order:
                f.write(_bytes(states[k]))
        self._drop()
        return path

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in order."""
        try:
            found = [_NAME.match(p.name) for p in self.folder.glob("step-*")]
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.folder} can be no folder of checkpoints: {e}") from None
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
        if _digest(states) != about["states"]:
            raise self._damaged(step, "its states are not those that were written")
        wanted = {k: _own_order(x) for k, x in like.items()}
        for k in sorted(states.keys() | like.keys()):
            here, there = (f"{x[k].dtype}{list(x[k].shape)}" if k in x else "absent" for x in (wanted, states))
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
            raise self._damaged(step, e) from None
        except OSError as e:  # a folder, for one
            raise CheckpointError(f"{self._path(step)} cannot be read: {e}") from None

    def _damaged(self, step: int, why: object) -> CheckpointError:
        return CheckpointError(f"{self._path(step)} is damaged: {why}; remove it to go on from the one before")

    def _about(self, step: int) -> dict[str, Any]:
        with self._open(step) as f:
            metadata = f.metadata() or {}
        if "wasat" not in metadata:
            raise CheckpointError(f"{self._path(step)} is no checkpoint of a training run")
        text = metadata["wasat"]
        if metadata.get("sha256") != sha256(text.encode()).hexdigest():
            raise self._damaged(step, "what it says of its run is not what was written")
        about: dict[str, Any] = json.loads(text)
        return about

    def _drop(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept:
                self._path(step).unlink()
        for p in self.folder.glob("step-*.unfinished"):  # of runs that were killed
            p.unlink()


def _own_order(x: Any) -> np.ndarray:
    """A number or an array as an array in this machine's order of bytes; no copy where it is one."""
    made = np.asarray(x)
    return made if made.dtype.isnative else made.astype(made.dtype.newbyteorder("="))


def _keys(more: Any) -> Iterator[Any]:
    """The keys of all mappings in it."""
    if isinstance(more, Mapping):
        yield from more
    for x in more.values() if isinstance(more, Mapping) else more if isinstance(more, list | tuple) else ():
        yield from _keys(x)


def _bytes(x: np.ndarray) -> memoryview:
    """The bytes of an array in row-major order; no copy where they lie so."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _digest(states: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    made = sha256()
    for k in sorted(states):
        made.update(f"{k}: {states[k].dtype}{list(states[k].shape)}\n".encode())
        made.update(_bytes(states[k]))
    return made.hexdigest()
