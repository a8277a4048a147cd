"""What runs: the entries of an artifact's library, each with the weights that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import fit
from .artifact import WEIGHTS, check_hash, read_manifest, sha256
from .device import HostMemory
from .errors import ArtifactError, InputError
from .hosts.host import Host
from .hosts.open import open_machine
from .hosts.plan import SOURCES, read_plan
from .manifest import Entry, Manifest
from .module import Library, check_ffi
from .weights import Weights


class Engine:
    """A loaded artifact: its entries can be called. :func:`start` makes one. ``memory``: where what they take has to be."""

    def __init__(
        self, folder: Path, manifest: Manifest, library: Library | Host, weights: Mapping[str, Any], memory: Any
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = weights
        self.memory = memory
        self._library = library
        self._functions: dict[str, Callable[..., Any]] = {}

    def entry(self, name: str) -> Entry:
        """The signature of an entry point. Raises InputError for a name there is none of."""
        if not isinstance(name, str) or name not in self.manifest.entries:
            raise InputError(f"{self.folder} has no entry {name!r}; it has {', '.join(self.manifest.entries)}")
        return self.manifest.entries[name]

    def function(self, entry: str) -> Callable[..., Any]:
        """The compiled function of an entry point: takes tensors, its inputs, states and weights."""
        if entry not in self._functions:
            self._functions[entry] = self._library.function(entry)
        return self._functions[entry]

    def weights_of(self, entry: str) -> tuple[Any, ...]:
        """The tensors that an entry takes after its inputs and states."""
        return tuple(self.weights[name].tensor for name in self.entry(entry).weights)

    def run(self, entry: str, **arrays: Any) -> dict[str, np.ndarray]:
        """Calls an entry point without states; returns its outputs by name.

        Raises InputError for inputs that are missing, unknown or do not fit the entry's signature.
        """
        e = self.entry(entry)
        if e.states:
            raise InputError(f"entry {entry} keeps caches: use session()")
        values = fit(f"entry {entry}", e.inputs, arrays, {}, e.checks, e.indices)
        results = self.function(entry)(*map(self.memory.tensor_of, values), *self.weights_of(entry))
        return {spec.name: self.memory.array_of(x) for spec, x in zip(e.outputs, results)}


def start(folder: Path, threads: int | None = None, verify: bool = True) -> Engine:
    """The engine of an artifact folder; see :func:`wasat.runtime.load`."""
    for _ in range(3):
        before = _identity(folder)
        try:
            return _start(folder, threads, verify)
        except ArtifactError:
            if _identity(folder) == before:
                raise
    return _start(folder, threads, verify)  # it was replaced while it was read


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from the one that replaces it."""
    try:
        found = folder.stat()
    except (OSError, ValueError):  # it is no name for a folder; reading it says so
        return None
    return found.st_dev, found.st_ino


def _start(folder: Path, threads: int | None, verify: bool) -> Engine:
    manifest = read_manifest(folder)
    planned = manifest.target.kind in SOURCES
    if not planned:
        check_ffi(manifest)
    with ThreadPoolExecutor() as pool:
        others = [n for n in manifest.files if n != WEIGHTS] if verify else []
        hashes = [pool.submit(sha256, folder / n) for n in others]
        weights = Weights(folder / WEIGHTS, manifest.weights, hashed=verify)
        for name, found in zip(others, hashes):
            check_hash(folder / name, found.result(), manifest)
        if weights.sha256 is not None:
            check_hash(folder / WEIGHTS, weights.sha256, manifest)
    if planned:
        plan = read_plan(folder, manifest.target.kind)
        host = Host(plan, open_machine(manifest.target.kind, plan.needs))
        return Engine(folder, manifest, host, host.upload(weights.arrays()), host.memory)
    library = Library(folder, manifest, threads)
    return Engine(folder, manifest, library, weights.buffers(), HostMemory)
