"""A JSON object, read field by field."""

from __future__ import annotations

from typing import Any

from .errors import AGAIN, ArtifactError


class Fields:
    """A JSON object whose fields are taken with their types; errors name the field's path."""

    def __init__(self, data: Any, path: str) -> None:
        self.path = path
        if not isinstance(data, dict):
            raise ArtifactError(f"manifest.json: {path or 'the whole'} is {_kind(data)}, not an object; {AGAIN}")
        self.data = data

    def get(self, name: str, *types: type, optional: bool = False) -> Any:
        where = self._at(name)
        value = self.data.get(name)
        if value is None and optional:
            return None
        if name not in self.data:
            raise ArtifactError(f"manifest.json: {where} is missing; {AGAIN}")
        if not isinstance(value, types) or isinstance(value, bool):
            raise ArtifactError(
                f"manifest.json: {where} is {_kind(value)}, not {' or '.join(map(_NAMES.__getitem__, types))}; {AGAIN}"
            )
        if isinstance(value, int) and value < 0:
            raise ArtifactError(f"manifest.json: {where} is {value}; it cannot be negative; {AGAIN}")
        return value

    def flag(self, name: str) -> bool:
        """A truth value; absent: false."""
        value = self.data.get(name, False)
        if not isinstance(value, bool):
            raise ArtifactError(f"manifest.json: {self._at(name)} is {_kind(value)}, not true or false; {AGAIN}")
        return value

    def items(self, name: str, *types: type, optional: bool = False) -> list[Any]:
        values = self.get(name, list, optional=optional) or []
        items = Fields({str(i): x for i, x in enumerate(values)}, self._at(name))
        return [items.get(i, *types) for i in items.data]

    def section(self, name: str) -> Fields:
        return Fields(self.get(name, dict), self._at(name))

    def optional(self, name: str) -> Fields | None:
        """A section that may be null or absent."""
        return None if self.data.get(name) is None else self.section(name)

    def sections(self, name: str) -> list[Fields]:
        return [Fields(x, f"{self._at(name)}.{i}") for i, x in enumerate(self.items(name, dict))]

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def _kind(value: Any) -> str:
    if isinstance(value, (bool, float)):
        return repr(value)
    return "null" if value is None else _NAMES.get(type(value), repr(value))
