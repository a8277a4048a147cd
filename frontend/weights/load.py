"""Numbers for the parameters of a program of one's own: all of them, under exactly their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from wasat.ir import ArrayParam, CheckpointError, DType, IRError, ParamSource, Program, QArray, TensorType, Type, type_of

from .safetensors import STORED, FileParam, Stored, listed, read_folder, read_header

_SUGGESTED = 20
"""Names that are compared with all others: as many as are shown of a kind."""


@dataclass(frozen=True)
class _Converted:
    """An array in memory, converted to ``type``'s element type each time it is loaded."""

    array: np.ndarray
    type: TensorType

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        return self.array.astype(self.type.dtype.np)


def load_weights(program: Program, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> Program:
    """Gives every parameter of ``program`` its numbers; returns the program, which is changed in place.

    ``source``: arrays by name, a folder with ``model.safetensors`` (or its shards), or one safetensors file, which is mapped
    and read when needed. Floats of 16 and 32 bits are converted to the parameter's type, nothing else is; arrays are not
    copied. ``ignore``: names, with ``*`` for any text, that the source may have beyond the parameters.

    Raises CheckpointError, and changes nothing, where a parameter is missing, a name unknown, a shape or an element type
    another: all of them are listed.
    """
    if isinstance(ignore, str):
        ignore = (ignore,)
    found: Mapping[str, Any]
    if isinstance(source, Mapping):
        where, found = "the arrays", source
    elif isinstance(source, (str, Path)):
        path = Path(source)
        where, found = str(path), read_header(path) if path.suffix == ".safetensors" else read_folder(path)
    else:
        raise CheckpointError(f"load_weights takes arrays by name, a folder or a safetensors file, not {type(source).__name__}")
    wanted = program.params
    missing = [name for name in wanted if name not in found]
    unknown = [n for n in found if n not in wanted and not any(fnmatchcase(str(n), p) for p in ignore)]
    problems = [f"missing: {n} {wanted[n].type}{_like(n, unknown, i)}" for i, n in enumerate(missing)]
    problems += [f"unknown: {n}{_like(n, missing or wanted, i)}" for i, n in enumerate(unknown)]
    sources: dict[str, ParamSource] = {}
    for name, param in wanted.items():
        if name in found:
            try:
                sources[name] = _source(param.type, found[name])
            except CheckpointError as e:
                problems.append(f"{name} {e}")
    if problems:
        raise CheckpointError(f"{where}: not what the program's parameters are (none was changed):\n{listed(problems)}")
    program.params.update(sources)
    return program


def _like(name: object, others: Iterable[object], turn: int) -> str:
    """The name that may have been meant."""
    if turn >= _SUGGESTED:
        return ""
    texts = [str(o) for o in others]
    tail = [o for o in texts if o.endswith(f".{name}") or str(name).endswith(f".{o}")]  # a prefix more or less
    near = tail[:1] or get_close_matches(str(name), texts, n=1, cutoff=0.75)
    return f" (is it {near[0]}?)" if near else ""


def _source(wanted: Type, given: Any) -> ParamSource:
    """A source of type ``wanted``; CheckpointError says what else was given."""
    stored = given if isinstance(given, Stored) else None
    if stored is None:
        given = given if isinstance(given, (np.ndarray, QArray)) else _array(given)
    try:
        type: Type = TensorType(stored.dtype, stored.shape) if stored is not None else type_of(given)
    except IRError as e:
        raise CheckpointError(f"has an element type that is none of ours: {e.message}") from None
    if type == wanted and stored is None:
        return ArrayParam(given, wanted)
    if not isinstance(wanted, TensorType) or not isinstance(type, TensorType):
        raise CheckpointError(f"is {type}, the program asks for {wanted}")
    if type.shape != wanted.shape:
        raise CheckpointError(f"is misshaped: {_sizes(type)}, the program asks for {_sizes(wanted)}")
    if type.dtype is not wanted.dtype and not (type.dtype in STORED and wanted.dtype in STORED):
        convert = f"; convert it: .astype(np.{wanted.dtype.np.name})" if wanted.dtype is not DType.BF16 else ""
        raise CheckpointError(f"is mistyped: {type.dtype}, the program asks for {wanted.dtype}" + ("" if stored else convert))
    return FileParam(wanted, stored) if stored is not None else _Converted(given, wanted)


def _array(given: Any) -> np.ndarray:
    if isinstance(given, (str, bytes)) or not hasattr(given, "__array__"):
        raise CheckpointError(f"is a {type(given).__name__}, not an array")
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"is a {type(given).__name__} that is not readable as a NumPy array: {e}") from None


def _sizes(t: TensorType) -> str:
    return f"[{', '.join(map(str, t.shape))}]"
