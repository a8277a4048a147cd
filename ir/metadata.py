"""The interface and the origin of a program as one dictionary of plain values, which may be read and set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from .errors import IRError
from .interface import Embedder, Encoder, Generation, Head, Media

if TYPE_CHECKING:
    from .program import Program

_INTERFACE = ("name", "context", "chunk", "vocab", "generation", "media", "heads", "states")
_ORIGIN = ("family", "tokenizer")


class Metadata(MutableMapping[str, Any]):
    """``metadata["context"] = 64`` is ``program.declare(context=64)``; what is not stated is not there.

    ``generation`` is ``{"bos", "eos", "pad"}``, ``media`` ``{"vocab", "dim", KIND: {"entry", ..}}``, ``heads``
    ``{NAME: {"entry", "of"}}``, ``states`` their names and facts. Raises IRError for other keys and for values of other types.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def __getitem__(self, key: str) -> Any:
        value = getattr(self._of(key), key)
        if value is None or value == () or value == "":
            raise KeyError(key)
        return _plain(key, value)

    def __setitem__(self, key: str, value: Any) -> None:
        program = self._program
        if self._of(key) is program.origin:
            program.origin = dataclasses.replace(program.origin, **{key: value})
        elif key == "states":
            raise IRError("states are what passes derive: set program.interface.states")
        else:
            program.declare(**{key: _typed(key, value)})

    def __delitem__(self, key: str) -> None:
        self[key]  # a KeyError, if it is not there
        empty: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self._of(key)) if f.name == key}
        if key in _ORIGIN:
            self._program.origin = dataclasses.replace(self._program.origin, **empty)
        else:
            self._program.declare(**empty)

    def __iter__(self) -> Iterator[str]:
        return (k for k in (*_INTERFACE, *_ORIGIN) if getattr(self._of(k), k) not in (None, (), ""))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _of(self, key: str) -> Any:
        if key in _ORIGIN:
            return self._program.origin
        if key in _INTERFACE:
            return self._program.interface
        raise IRError(f"metadata has no {key!r}; there are {', '.join((*_INTERFACE, *_ORIGIN))}")


def _plain(key: str, value: Any) -> Any:
    if key == "generation":
        return {**dataclasses.asdict(value), "eos": list(value.eos)}
    if key == "media":
        encoders = {}
        for e in value.encoders:
            encoders[e.kind] = {k: v for k, v in dataclasses.asdict(e).items() if k != "kind" and v is not None}
        return {"vocab": value.vocab, "dim": value.dim, **encoders, **({"seen": True} if value.seen else {})}
    if key == "embedder":
        return dataclasses.asdict(value)
    if key == "heads":
        return {h.name: {"entry": h.entry, "of": h.of} for h in value}
    return [dataclasses.asdict(s) for s in value] if key == "states" else value


def _typed(key: str, value: Any) -> Any:
    """Raises IRError for a value of another shape."""
    try:
        if key == "generation" and isinstance(value, Mapping):
            return Generation(**{**value, "eos": tuple(value.get("eos") or ())})
        if key == "media" and isinstance(value, Mapping):
            own = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
            return Media(**own, encoders=tuple(Encoder(kind=k, **v) for k, v in value.items() if isinstance(v, Mapping)))
        if key == "embedder" and isinstance(value, Mapping):
            return Embedder(**value)
        if key == "heads" and isinstance(value, Mapping):
            return tuple(Head(name=k, **v) for k, v in value.items())
    except TypeError as e:
        raise IRError(f"metadata[{key!r}] is {value!r}: {e}") from None
    return value


