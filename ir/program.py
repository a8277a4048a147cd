"""A program: entry points that share parameters, what runs them must know, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import IRError, TypeMismatch, VerifyError
from .graph import Graph, ParamSource
from .interface import Interface, Origin
from .metadata import Metadata
from .types import Array, type_of


@dataclass
class Program:
    """Entry points that share one set of named parameters.

    ``interface`` may be given as a dictionary, ``{"context": 64}``; :attr:`metadata` is that dictionary.
    """

    graphs: dict[str, Graph]
    params: dict[str, ParamSource] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if isinstance(given := self.interface, Mapping):
            self.interface = Interface()
            self.metadata.update(given)

    @property
    def metadata(self) -> Metadata:
        """Interface and origin as one dictionary of plain values, which may be set: ``metadata["context"] = 64``."""
        return Metadata(self)

    def __str__(self) -> str:
        from .printer import interface_text

        return "\n".join([*filter(None, [interface_text(self.interface)]), *(str(g) for g in self.graphs.values())])

    def copy(self) -> Program:
        """One whose graphs, parameters and interface may change without these changing."""
        return Program({k: g.clone() for k, g in self.graphs.items()}, dict(self.params), self.interface, self.origin)

    def declare(self, **fields: Any) -> None:
        """Sets fields of the interface, ``context=1024``. Raises IRError for one that there is not or of another type."""
        if unknown := sorted(fields.keys() - {f.name for f in dataclasses.fields(Interface)}):
            known = ", ".join(f.name for f in dataclasses.fields(Interface))
            raise IRError(f"an interface has no field {unknown[0]}; it has {known}")
        self.interface = dataclasses.replace(self.interface, **fields)

    def _repr_html_(self) -> str:
        from .html import program_html

        return program_html(self)

    def __getitem__(self, name: str) -> Graph:
        if name not in self.graphs:
            raise IRError(f"no graph @{name} in this program; there are {', '.join('@' + n for n in self.graphs)}")
        return self.graphs[name]

    def load(self, name: str) -> Array:
        """The numbers of a parameter. Raises IRError, naming it, where they are not of the type that the graphs read."""
        if name not in self.params:
            raise IRError(f"the program has no parameter {name}")
        try:
            x = self.params[name].load()
        except TypeMismatch as e:
            raise TypeMismatch(f"parameter {name}: {e.message}", e.loc) from None
        found = type_of(x)
        for g in self.graphs.values():
            if name in g.params and g.params[name].type != found:
                raise TypeMismatch(f"parameter {name} is {found}; graph @{g.name} reads {g.params[name].type}")
        return x

    def map(self, change: Callable[[Graph], object], only: Iterable[str] | None = None) -> None:
        """Calls ``change`` on each graph (or those named in ``only``)."""
        for name in list(self.graphs) if only is None else only:
            change(self[name])

    def verify(self) -> None:
        """Verifies each graph, that every parameter it reads exists with that type, and that the interface is the graphs'."""
        from .verify import verify, verify_interface

        verify_interface(self)

        for g in self.graphs.values():
            verify(g)
            for name, v in g.params.items():
                if name not in self.params:
                    raise VerifyError(f"graph @{g.name} reads parameter {name}, which the program does not have")
                if self.params[name].type != v.type:
                    raise VerifyError(f"parameter {name} is {self.params[name].type}; graph @{g.name} reads {v.type}")
