"""Modules: objects whose attributes are parameters and further modules. A parameter's name is its attribute path."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from wasat.ir import DimLike, DType, TensorType

from wasat import ir

from .tensor import Tensor, Trace, _current, current, fail


class Parameter(Tensor):
    """A named tensor of a program, used in expressions like any other.

    Until data are loaded it stands for random numbers, ``mean + std * normal``, fixed by its name and a seed.
    """

    def __init__(self, shape: Sequence[DimLike], dtype: DType | str = "f32", *, mean: float = 0.0, std: float = 0.02) -> None:
        if not isinstance(shape, (tuple, list)):
            raise ir.TypeMismatch(f"Parameter: the shape is a tuple of sizes, not {shape!r}")
        self._type = TensorType(DType.of(dtype), tuple(shape))
        self.noise = (mean, std)
        self.uniform = False
        """Whether the random numbers are uniform (with that mean and deviation); :mod:`.init` sets it."""

    @property
    def trace(self) -> Trace:
        return current("using a parameter")

    @property
    def type(self) -> TensorType:
        return self._type

    @property
    def value(self) -> ir.Value:
        t = self.trace
        name = t.parameter_names.get(id(self))
        if name is None:
            fail(
                f"a parameter {self._type} is used that cannot be reached from {t.root}: make the module that holds it "
                f"an attribute of {t.root} or of a module inside it"
            )
        return t.graph.add_param(name, self._type)

    def __repr__(self) -> str:
        return f"Parameter({self._type})"


@dataclass(frozen=True)
class RandomParam:
    """A parameter that holds random numbers: the same for the same name and seed."""

    name: str
    type: TensorType
    seed: int = 0
    mean: float = 0.0
    std: float = 0.02
    uniform: bool = False

    def load(self) -> np.ndarray:
        """The array, of ``type``'s shape and dtype."""
        shape = self.type.concrete({})
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        if self.uniform:
            noise = (rng.random(shape, np.float32) * 2 - 1) * np.float32(3**0.5)
        else:
            noise = rng.standard_normal(shape, np.float32)
        return (self.mean + self.std * noise).astype(self.type.dtype.np)


class Module:
    """Base of what a user declares: ``__init__`` sets parameters and modules, ``__call__`` is the forward pass.

    Modules in lists, tuples and dictionaries count (``layers.0.q.weight``). A module called twice, or reachable by two
    paths, has one set of parameters, named after the first path.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            setattr(cls, "__call__", scoped(cls.__dict__["__call__"]))  # noqa: B010 (mypy refuses the assignment)

    def walk(self) -> Iterator[tuple[str, Module | Parameter]]:
        """``(path, module or parameter)`` of everything inside (and itself, path ``""``), in order, each once."""
        yield from _walk(self, "", set())

    def parameters(self) -> dict[str, Parameter]:
        """Its parameters by name, in order of declaration."""
        return {path: x for path, x in self.walk() if isinstance(x, Parameter)}

    def init(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random values for all parameters, fixed by ``seed``."""
        return {name: p.load() for name, p in random_params(self, seed).items()}


def random_params(module: Module, seed: int) -> dict[str, RandomParam]:
    """A lazy random source for each parameter of ``module``."""
    return {name: RandomParam(name, p.type, seed, *p.noise, p.uniform) for name, p in module.parameters().items()}


class ModuleList(list[Module]):
    """Modules in a row; an ordinary list serves as well."""


def _walk(x: object, path: str, seen: set[int]) -> Iterator[tuple[str, Module | Parameter]]:
    if isinstance(x, (Module, Parameter)):
        if id(x) in seen:
            return
        seen.add(id(x))
        yield path, x
    parts: Mapping[Any, object]
    if isinstance(x, Module):
        parts = vars(x)
    elif isinstance(x, (list, tuple)):
        parts = dict(enumerate(x))
    elif isinstance(x, dict):
        parts = x
    else:
        return
    for key, part in parts.items():
        yield from _walk(part, f"{path}.{key}" if path else str(key), seen)


def scoped(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a module's method so that the locations of nodes carry the module's path."""

    @functools.wraps(call)
    def run(self: Module, *args: Any, **kwargs: Any) -> Any:
        t = _current.get()
        if t is None:
            raise ir.IRError(
                f"{type(self).__name__} is called outside a trace: nn.trace(module, inputs) runs it on symbolic inputs"
            )
        if t.scope and t.scope[-1][0] == id(self):  # super().__call__
            return call(self, *args, **kwargs)
        path = t.module_paths.get(id(self))
        if path is None:  # made on the fly
            path = f"{t.path}.{type(self).__name__}".lstrip(".")
        elif t.path and not path.startswith(t.path + "."):  # shared: where it is called from says more
            path = f"{t.path}.{path.rpartition('.')[2]}"
        t.scope.append((id(self), path))
        try:
            return call(self, *args, **kwargs)
        finally:
            t.scope.pop()

    return run
