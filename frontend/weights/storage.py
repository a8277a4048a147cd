"""How parameters are stored, apart from what a graph makes of them."""

from __future__ import annotations

from typing import Protocol

from wasat.ir import Array, Builder, Graph, TensorType, Type


class StoredTensor(Protocol):
    """A tensor of a file, whatever reads that: nothing is read before ``load``, and no more than the rows asked for."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> Type:
        """The type that it is stored in."""

    def load(self, rows: slice = slice(None)) -> Array:
        """The numbers; a view of the file where nothing has to be taken apart."""


def store_as(graph: Graph, name: str, type: Type) -> None:
    """Parameter ``name`` of ``graph`` becomes one of ``type``, of which the values that it was are made before all else.

    Floats are cast, quantized weights dequantized: meaning and users stay as they are.
    """
    old = graph.params[name]
    if type == old.type:
        return
    names = list(graph.params)
    del graph.params[name]
    graph.rename(old, f"{old.name}.dense")
    new = graph.add_param(name, type)
    graph.params = {k: graph.params[k] for k in names}
    b = Builder(graph, before=graph.first)
    dense = b.cast(new, dtype=old.tensor.dtype) if isinstance(type, TensorType) else b.dequantize(new, dtype=old.tensor.dtype)
    graph.replace_uses(old, dense)
