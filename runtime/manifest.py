"""What ``manifest.json`` says: the signatures, limits and needs of a compiled program, read with every field's type checked.

Fields that this version does not know are left alone: what changes the meaning of an artifact changes ``format``.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from .dimensions import FUNCTIONS, Extent, extent, parsed, solved
from .errors import AGAIN, ArtifactError
from .fields import Fields
from .interface import Interface, TensorSpec, check_interface, read_interface, read_tensor

FORMAT = 3


@dataclass(frozen=True)
class Check:
    """An equation between sizes that the library takes for granted: ``needs`` says it in words, ``where`` names the node."""

    left: Extent
    right: Extent
    needs: str
    where: str


@dataclass(frozen=True)
class Indices:
    """An input whose elements the library takes for indices: they must be in ``low .. high - 1``."""

    input: str
    low: Extent
    high: Extent
    where: str


@dataclass(frozen=True)
class Entry:
    """One function of the library: ``inputs``, then the states and the weights named -> ``outputs``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[str, ...]
    weights: tuple[str, ...]
    checks: tuple[Check, ...]
    indices: tuple[Indices, ...]


@dataclass(frozen=True)
class Needs:
    """The machine that the library was compiled for."""

    kind: str
    arch: str
    os: str
    features: tuple[str, ...]
    """Instruction sets, in the words of /proc/cpuinfo."""
    device: str = "cpu"
    """What the target is called."""
    mcpu: str = ""
    """Which model of it: the CPU by LLVM's name, architectures of GPUs."""
    libraries: tuple[str, ...] = ()
    """Files of the artifact that the library calls, in the order in which they are loaded."""


@dataclass(frozen=True)
class FileSpec:
    """A file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole of it."""

    wasat: str
    tvm: str
    tvm_ffi: str
    target: Needs
    entries: dict[str, Entry]
    interface: Interface
    weights: tuple[TensorSpec, ...]
    files: dict[str, FileSpec]
    no_cache: str = ""
    """Why there is no ``prefill``; empty where there is, or nobody said."""


def read_needs(target: Fields) -> Needs:
    """The section ``target``, as a target's requirements() write it."""
    return Needs(
        kind=target.get("kind", str), arch=target.get("arch", str), os=target.get("os", str),
        features=tuple(target.items("features", str)), device=target.get("device", str, optional=True) or "cpu",
        mcpu=target.get("mcpu", str, optional=True) or "", libraries=tuple(target.items("libraries", str, optional=True)),
    )  # fmt: skip


def check_format(data: Any) -> None:
    """Raises ArtifactError unless the JSON value ``data`` says that it has the format read here."""
    top = Fields(data, "")
    number = top.get("format", int)
    if number > FORMAT:
        made_by = top.data.get("wasat", "?")
        raise ArtifactError(
            f"the artifact has format {number} (made by wasat {made_by}) and this runtime reads format {FORMAT}: "
            f"update wasat, or {AGAIN}"
        )
    if number != FORMAT:
        raise ArtifactError(f"the artifact has format {number}; this runtime reads format {FORMAT}: {AGAIN}")


def parse_manifest(data: Any) -> Manifest:
    """The manifest in the JSON value ``data``. Raises ArtifactError for another format, a missing or mistyped field."""
    check_format(data)
    top = Fields(data, "")
    target, entries, files = (top.section(k) for k in ("target", "entries", "files"))
    manifest = Manifest(
        wasat=top.get("wasat", str), tvm=top.get("tvm", str), tvm_ffi=top.get("tvm_ffi", str),
        target=read_needs(target),
        entries={name: _entry(entries.section(name)) for name in entries.data},
        interface=read_interface(top), weights=tuple(map(read_tensor, top.sections("weights"))),
        files={name: _file(files.section(name)) for name in files.data},
        no_cache=top.get("no_cache", str, optional=True) or "",
    )  # fmt: skip
    _check(manifest)
    return manifest


def _entry(f: Fields) -> Entry:
    return Entry(
        tuple(map(read_tensor, f.sections("inputs"))), tuple(map(read_tensor, f.sections("outputs"))),
        tuple(f.items("states", str)), tuple(f.items("weights", str)), tuple(map(_size_check, f.sections("checks"))),
        tuple(map(_indices, f.sections("indices"))),
    )  # fmt: skip


def _indices(f: Fields) -> Indices:
    spec = Indices(f.get("input", str), f.get("low", str), f.get("high", str), f.get("where", str))
    for d in (spec.low, spec.high):
        parsed(str(d))
    return spec


def _size_check(f: Fields) -> Check:
    check = Check(f.get("left", str), f.get("right", str), f.get("needs", str), f.get("where", str))
    for d in (check.left, check.right):
        parsed(str(d))
    return check


def _file(f: Fields) -> FileSpec:
    return FileSpec(f.get("sha256", str), f.get("bytes", int))


def _check(m: Manifest) -> None:
    arrays = {w.name for w in m.weights}
    for name, e in m.entries.items():
        _check_signature(name, e)
        fed = next((x.shape for x in e.inputs if x.name == m.interface.tokens), ())
        if name in ("prefill", "decode") and len(fed) != 2:
            raise ArtifactError(f"manifest.json: entry {name} takes no tokens {m.interface.tokens!r} of two axes; {AGAIN}")
        for i in e.indices:
            if all(x.name != i.input for x in e.inputs):
                raise ArtifactError(f"manifest.json: entry {name} takes no input {i.input} to hold indices; {AGAIN}")
        for s in e.states:
            if all(s != state.name for state in m.interface.states):
                raise ArtifactError(f"manifest.json: entry {name} has a state {s} that is not described; {AGAIN}")
        for weight in e.weights:
            if weight not in arrays:
                raise ArtifactError(f"manifest.json: entry {name} reads a weight {weight} that is not described; {AGAIN}")
    for state in m.interface.states:
        if isinstance(state.empty, str) and state.empty not in arrays:
            raise ArtifactError(f"manifest.json: state {state.name} begins as {state.empty}, which is no weight; {AGAIN}")
    check_interface(m.interface, {name: [x.name for x in e.inputs] for name, e in m.entries.items()})
    for w in m.weights:
        if any(isinstance(d, str) for d in w.shape):
            raise ArtifactError(f"manifest.json: weight {w.name} has the shape {list(w.shape)}, not whole numbers; {AGAIN}")
    for name in m.target.libraries:
        if name not in m.files:
            raise ArtifactError(f"manifest.json: target.libraries names {name!r}, which is no file of the artifact; {AGAIN}")
    for name in m.files:
        if not is_file_name(name):
            raise ArtifactError(f"manifest.json: {name!r} is no name for a file of an artifact; {AGAIN}")


def is_file_name(name: str) -> bool:
    """Whether a file of an artifact may be called so, beside its manifest, on any system."""
    return re.fullmatch(r"[\w.+-]{1,200}", name) is not None and name not in (".", "..", "manifest.json")


def _check_signature(name: str, e: Entry) -> None:
    """An entry returns something, and every size of its inputs can be told from the arrays."""
    for what, specs in (("inputs", e.inputs), ("outputs", e.outputs)):
        names = [s.name for s in specs]
        if len(set(names)) < len(names) or (what == "outputs" and not names):
            raise ArtifactError(f"manifest.json: entry {name} has the {what} {', '.join(names) or 'none'}; {AGAIN}")
    dims = [d for s in e.inputs for d in s.shape]
    bound = {d for d in dims if isinstance(d, str) and d.isidentifier()}
    for d in dims:
        used = {x.id for x in ast.walk(parsed(d)) if isinstance(x, ast.Name)} if isinstance(d, str) else set()
        unknown = used - bound - FUNCTIONS.keys()
        if len(unknown) == 1 and _tells(d, unknown, bound):
            continue
        if unknown or (isinstance(d, int) and d >= 2**62):
            raise ArtifactError(f"manifest.json: entry {name} has an input of size {d}, which no array tells; {AGAIN}")


def _tells(d: Extent, unknown: set[str], bound: set[str]) -> bool:
    """Whether a size tells the one symbol in it that is ``unknown``: tried with small numbers."""
    known = dict.fromkeys(bound, 1)
    try:
        return all(solved(d, extent(d, {**known, **dict.fromkeys(unknown, n)}), known) for n in (1, 2, 5))
    except ZeroDivisionError:
        return False
