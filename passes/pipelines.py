"""Pipelines as text: ``"default"``, ``"my-pass, default"``,
``"cleanup, fuse-attention, quantize{scheme=int4, activation=none}"``.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from wasat.ir import WasatError

from .core import Pass

DEFAULT = "default"
"""In a pipeline: the passes that run where none is given."""
ENTRY_POINTS = "wasat.passes"
"""The group under which installed packages announce passes."""


def pipeline(spec: str | Pass | Sequence[str | Pass], default: Sequence[Pass]) -> list[Pass]:
    """The passes that ``spec`` names: text, passes, or both in a list; ``"default"`` stands for those of ``default``.

    A pass is named as it calls itself (``fuse-attention``), whether it is Wasat's, one of a class that was defined already, or
    one that an installed package announces under the entry points ``wasat.passes``; or by module and class,
    ``my_passes:DropSmallDropout``. Options stand in braces, ``quantize{scheme=int4, activation=none}``: numbers, ``true``,
    ``false``, ``none``, words, and what else Python writes as a literal.

    Raises WasatError for a name, an option or a value that does not exist.
    """
    if isinstance(spec, str):
        found: list[Pass] = []
        for name, options in _items(spec):
            if name == DEFAULT and not options:
                found += default
            else:
                found.append(_made(name, options))
        return found
    if not isinstance(spec, (Pass, Iterable)):
        raise WasatError(f"a pipeline is a text, a pass or a list of these, not {type(spec).__name__}")
    return [spec] if isinstance(spec, Pass) else [p for item in spec for p in pipeline(item, default)]


def pipeline_text(passes: Sequence[Pass]) -> str:
    """The passes as text that :func:`pipeline` reads; options that have their defaults are left out."""
    return ", ".join(_text(p) for p in passes)


def _options(cls: type[Pass]) -> list[Field[Any]]:
    return [f for f in fields(cls) if f.init] if is_dataclass(cls) else []


def _text(p: Pass) -> str:
    said = [
        f"{f.name}={_value_text(getattr(p, f.name))}" for f in _options(type(p)) if getattr(p, f.name) != f.default
    ]  # fmt: skip
    return p.name + (f"{{{', '.join(said)}}}" if said else "")


def _value_text(x: object) -> str:
    if isinstance(x, bool) or x is None:
        return str(x).lower()
    return x if isinstance(x, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", x) and x not in ("true", "false", "none") else repr(x)


def _items(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and options of each pass."""
    for item in _split(text, text):
        match = re.fullmatch(r"([\w.:-]+)\s*(?:\{(.*)\})?", item, re.DOTALL)
        if match is None:
            raise WasatError(f"pipeline {text!r}: {item!r} is not a pass, which reads NAME or NAME{{option=value, ..}}")
        options = {}
        for option in _split(match[2], text) if match[2] and match[2].strip() else ():
            key, equals, value = option.partition("=")
            if not equals or key.strip() in options:
                raise WasatError(f"pipeline {text!r}: {option!r} is not one option=value of {match[1]}")
            options[key.strip()] = value.strip()
        yield match[1], options


def _split(text: str, whole: str) -> list[str]:
    """The parts between commas that stand in no bracket and no quotation."""
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
        if depth < 0:
            break
    parts.append(text[start:].strip())
    if not text.strip():
        raise WasatError(f"pipeline {whole!r} names no pass; {DEFAULT!r} is what runs where none is given")
    if depth or quote or not all(parts):
        raise WasatError(f"pipeline {whole!r}: brackets, quotation marks and commas do not match")
    return parts


def _known() -> dict[str, type[Pass]]:
    """Every pass whose class is defined, by its name; of two of one name the later."""
    importlib.import_module("wasat.passes")  # all of Wasat's
    found: dict[str, type[Pass]] = {}
    left = [Pass]
    while left:
        cls = left.pop(0)
        left += cls.__subclasses__()
        if "name" in vars(cls):
            found[cls.name] = cls
    return found


def _class(name: str) -> type[Pass]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise WasatError(f"pass {name}: {e}") from None
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise WasatError(f"pass {name}: {attribute} is not a class of passes (wasat.passes.Pass)")
        return cls
    if name == DEFAULT:
        raise WasatError(f"{name!r} is a pipeline and takes no options: give them to a pass of it, by its name")
    known = _known()
    announced = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name not in known and name in announced:
        return _class(announced[name].value)
    if name not in known:
        near = difflib.get_close_matches(name, [DEFAULT, *known, *announced], 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted({DEFAULT, *known, *announced}))}"
        raise WasatError(f"no pass is called {name!r}: {hint}")
    return known[name]


def _made(name: str, options: Mapping[str, str]) -> Pass:
    cls = _class(name)
    hints = typing.get_type_hints(cls)
    declared = [f.name for f in _options(cls)]
    values = {}
    for key, text in options.items():
        if key not in declared:
            near = difflib.get_close_matches(key, declared, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(declared)}" if declared else "it has none"
            raise WasatError(f"pass {name} has no option {key!r}: {hint}")
        values[key] = _value(text)
        if not _fits(values[key], hints[key]):
            raise WasatError(f"pass {name}: {key}={text} is not {_said(hints[key])}")
    try:
        return cls(**values)
    except TypeError as e:  # an option without a default
        raise WasatError(f"pass {name}: {e}") from None


def _value(text: str) -> Any:
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fits(x: object, hint: Any) -> bool:
    """Whether ``x`` is of an annotated type; what is more than plain types, literals, tuples and unions is not looked into."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(x, h) for h in inner)
    if origin is Literal:
        return x in inner
    if origin is tuple and isinstance(x, tuple):
        return all(_fits(i, inner[0]) for i in x) if inner[1:] == (...,) else len(x) == len(inner) and all(map(_fits, x, inner))
    if hint in (None, type(None), bool, str):
        return x is None if hint in (None, type(None)) else isinstance(x, hint)
    if hint in (int, float):
        return isinstance(x, (int, hint)) and not isinstance(x, bool)
    return not isinstance(origin or hint, type) or isinstance(x, origin or hint)


def _said(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(_value_text(x) for x in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")
