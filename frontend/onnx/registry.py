"""The table of converters: ONNX operator -> a function that emits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from wasat.ir import DType

from .errors import OnnxError
from .files import element

if TYPE_CHECKING:
    from .importer import Frame, Importer

ML = "ai.onnx.ml"
TRAINING = "ai.onnx.preview.training"

MOST = 10_000
"""What is written out node by node (turns of a loop, elements of a window) is refused beyond this number."""


class Inline(Exception):
    """A converter's answer to a node that the operator's function body shall define."""


Converter = Callable[..., Any]
CONVERTERS: dict[tuple[str, str], list[tuple[int, Converter]]] = {}
"""(domain, operator) -> (operator-set version since which it holds, converter), oldest first."""


ATTRIBUTES: dict[tuple[str, str], frozenset[str]] = {}
"""(domain, operator) -> the attributes that its converter understands, of operators whose schema onnx does not have."""


def op(*names: str, since: int = 1, domain: str = "", attributes: str | None = None) -> Callable[[Converter], Converter]:
    """Registers ``f(c, n, *inputs)`` for operators: ``c`` emits, ``n`` holds the attributes, an absent input is None.

    It returns one operand, or a tuple of them (None for an output that does not exist). ``attributes``: the names that it
    understands, of an operator without a schema; a node with another one is refused.
    """

    def put(f: Converter) -> Converter:
        for name in names:
            if attributes is not None:
                ATTRIBUTES[domain, name] = frozenset(attributes.split())
            entry = CONVERTERS.setdefault((domain, name), [])
            entry.append((since, f))
            entry.sort(key=lambda e: e[0])
        return f

    return put


def converter(domain: str, name: str, version: int) -> Converter | None:
    """The converter for an operator whose definition dates from operator set ``version``."""
    found = None
    for since, f in CONVERTERS.get((domain, name), ()):
        if since <= version:
            found = f
    return found


@dataclass
class NodeView:
    """A node as a converter sees it: attributes with the schema's defaults filled in, and where it stands."""

    proto: onnx.NodeProto
    attrs: dict[str, Any]
    frame: Frame
    importer: Importer

    @property
    def op(self) -> str:
        return self.proto.op_type

    @property
    def name(self) -> str:
        return self.proto.name or (self.proto.output[0] if self.proto.output else self.proto.op_type)

    def __getitem__(self, key: str) -> Any:
        if key not in self.attrs:
            raise OnnxError(f"{self.op} node {self.name!r} lacks the attribute {key}")
        return self.attrs[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.attrs.get(key, default)

    def dtype(self, key: str, default: DType | None = None) -> DType:
        """An attribute that holds an element type; ``default`` where it is absent."""
        if key not in self.attrs and default is not None:
            return default
        return element(self[key], f"{self.op} node {self.name!r}: {key}")

    def wants(self, i: int) -> bool:
        """Whether output i is used under some name."""
        return i < len(self.proto.output) and bool(self.proto.output[i])

    def fail(self, message: str) -> OnnxError:
        return OnnxError(f"{self.op} node {self.name!r}: {message}")


def domain_of(name: str) -> str:
    return "" if name == "ai.onnx" else name


def schema_of(name: str, version: int, domain: str) -> Any:
    """The OpSchema (whose stub lacks half of its methods), or None for an operator that onnx does not define."""
    try:
        return onnx.defs.get_schema(name, version, domain)
    except onnx.defs.SchemaError:
        return None
