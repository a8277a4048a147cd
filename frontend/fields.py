"""One strict reader of what people write in files: a field is taken with its type, known to be harmless, or refused."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from wasat.ir import WasatError

_BOUNDS = {
    "least": ("at least", operator.ge), "above": ("above", operator.gt), "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}  # fmt: skip


class ConfigError(WasatError):
    """A configuration that is incomplete, contradictory, or asks for what is not implemented."""


class Fields:
    """The fields of one object of a file, each to be taken once; :meth:`finish` refuses what is left.

    ``where``: the file. ``harmless``: fields without effect, if not those of the class. ``path``: of the object in the file.
    ``lines``: of its fields, by path and name, where they are known. Kinds of files are classes that differ in the data below.
    """

    error: ClassVar[type[WasatError]] = ConfigError
    kinds: ClassVar[Mapping[Any, str]] = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object", list: "a list",
        tuple: "a list",
    }  # fmt: skip
    """What a value of a type is called."""
    most: ClassVar[Mapping[type, float]] = {float: float(np.finfo(np.float32).max)}
    """The largest number of a type, where no other bound is given."""
    needed: ClassVar[str] = ""
    """Behind "is missing"."""
    unknown: ClassVar[str] = "{name} is unknown; {hint}"
    """Of what is left: the first's ``name`` and a ``hint``, or all ``fields``, which mean nothing to ``what``."""
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields without effect."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Fields that may be left at this one value; any others may be null."""

    def __init__(
        self, given: Mapping[str, Any], where: str, harmless: frozenset[str] | None = None, path: str = "",
        lines: Mapping[tuple[str, str], int] | None = None,
    ) -> None:  # fmt: skip
        self.given, self.where, self.path, self.lines = dict(given), where, path, lines or {}
        self._taken = set(self.harmless if harmless is None else harmless)

    def at(self, name: str = "") -> str:
        """Where the field stands."""
        line = self.lines.get((self.path, name.partition(".")[0]))
        return self.where if line is None else f"{self.where}, line {line}"

    def named(self, name: str) -> str:
        """The field as messages call it."""
        return f"{self.path}.{name}" if self.path else name

    def fail(self, message: str, name: str = "") -> WasatError:
        """An error, to be raised, at the field ``name`` or the whole."""
        return self.error(f"{self.at(name)}: {message}")

    def wrong(self, name: str, value: Any, wanted: str) -> WasatError:
        """The error of a field that must be something else."""
        return self.fail(f"{self.named(name)} = {brief(value)} must be {wanted}", name)

    def inside(self, name: str, given: Any) -> Self:
        """The object ``given`` by the field ``name``, ``heads.0`` for an entry of a list."""
        if not isinstance(given, Mapping):
            raise self.wrong(name, given, self.kinds[dict])
        path = f"{self.path}.{name}" if self.path else name
        return type(self)(given, self.where, frozenset(), path, self.lines)

    def take(self, name: str, kind: Any, *default: Any, **bounds: float) -> Any:
        """The field ``name`` as a ``kind``: a Python type or a few of them, a dataclass (in a union, the one of that ``kind``),
        a tuple of one of them, Literal, or any of these or None; ``default`` if absent (none given: an error).

        Null is allowed, and is None, where ``default`` is None. ``least``, ``most``, ``above`` and ``below`` bound a number.
        """
        self._taken.add(name)
        if name not in self.given:
            if default:
                return default[0]
            alike = [k for k, v in self.given.items() if k not in self._taken and isinstance(v, dict) == (kind is dict)]
            near = difflib.get_close_matches(name, alike, 1, 0.75)
            why = f"; is {near[0]} meant to be it?" if near else self.needed
            raise self.fail(f"{self.named(name)} is missing{why}", near[0] if near else "")
        value = self.given[name]
        if value is None and default == (None,):
            return None
        value = self._read(kind, value, name)
        if not isinstance(kind, tuple) and kind in self.most:
            bounds.setdefault("most", self.most[kind])
        for bound, limit in bounds.items():
            words, holds = _BOUNDS[bound]
            if not holds(value, limit):
                raise self.wrong(name, value, f"{words} {limit:,}" if is_of(limit, int) else f"{words} {limit}")
        return value

    def _read(self, kind: Any, x: Any, name: str) -> Any:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            if x is None and type(None) in args:
                return None
            there = [a for a in args if a is not type(None)]
            if len(there) > 1:
                choice = {a.kind: a for a in there}
                said = x.get("kind") if isinstance(x, Mapping) else None
                if said not in choice:
                    raise self.wrong(f"{name}.kind", said, " or ".join(choice))
                there = [choice[said]]
            return self._read(there[0], x, name)
        if dataclasses.is_dataclass(kind):
            return self.inside(name, x).made(typing.cast(type, kind))
        if origin is tuple and isinstance(x, (list, tuple)):
            return tuple(self._read(args[0], item, f"{name}.{i}") for i, item in enumerate(x))
        if origin is Literal:
            if x not in args:
                raise self.wrong(name, x, " or ".join(map(repr, args)))
            return x
        x = as_float(x) if kind is float else x
        if origin is not None or not is_of(x, kind):
            several = kind if isinstance(kind, tuple) else (origin or kind,)
            raise self.wrong(name, x, " or ".join(self.kinds[k] for k in several))
        if isinstance(x, float) and not math.isfinite(x):
            raise self.wrong(name, x, "finite")
        return x

    def made(self, cls: type[Any]) -> Any:
        """A dataclass of all fields, by its types."""
        hints = typing.get_type_hints(cls)
        values = {
            f.name: self.take(f.name, hints[f.name], *(() if f.default is dataclasses.MISSING else (f.default,)))
            for f in dataclasses.fields(cls)
        }
        self.finish()
        try:
            return cls(**values)
        except ConfigError as e:  # sizes that do not go together
            raise self.fail(str(e)) from None

    def refuse(self, name: str, neutral: Any, why: str) -> None:
        """Refuses ``name`` unless it is absent, null or ``neutral``."""
        self._taken.add(name)
        value = self.given.get(name)
        if value is not None and (isinstance(value, np.ndarray) or value != neutral):
            raise self.fail(f"{self.named(name)} is {brief(value)}: {why}", name)

    def ignore(self, *names: str) -> None:
        """Takes fields that have no effect here."""
        self._taken.update(names)

    def finish(self, what: str = "") -> None:
        """Refuses every field that ``what`` has not taken, unless it is null or at its neutral value."""
        left = {k: v for k, v in self.given.items() if k not in self._taken}
        left = {k: v for k, v in left.items() if (v != self.neutral[k] if k in self.neutral else v is not None)}
        if left:
            absent = self._taken - self.given.keys()
            fields = (f"{self.named(k)} = {brief(v)}{meant(k, absent, '', ' ({})', 0.85)}" for k, v in left.items())
            name = next(iter(left))
            hint = meant(name, self._taken, f"there are {', '.join(sorted(self._taken))}")
            raise self.fail(self.unknown.format(what=what, fields="; ".join(fields), name=self.named(name), hint=hint), name)


def is_of(value: object, kind: type | tuple[type, ...]) -> bool:
    """Whether a value that a file gives is of Python type ``kind``; a bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def as_float(value: Any) -> Any:
    """A whole number where a float is meant as one, an infinity beyond f32; anything else as it is."""
    if not is_of(value, int):
        return value
    return float(value) if abs(value) < 2**128 else math.inf if value > 0 else -math.inf


def meant(name: str, known: Iterable[str], otherwise: str, form: str = "{}", alike: float = 0.6) -> str:
    """For an error about a name that nobody knows: the known one nearest to it, if it is ``alike``."""
    near = difflib.get_close_matches(name, sorted(known), 1, alike)
    return form.format(f"did you mean {near[0]}?") if near else otherwise


def brief(value: Any) -> str:
    """A value in a message: not all of a long one."""
    try:
        text = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
