"""Runs a module on symbolic inputs and returns the program it wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from wasat.ir import Graph, IRError, Program, QTensorType, TensorType, Type

from wasat import ir

from .module import Module, Parameter, random_params
from .tensor import Tensor, Trace, _current, current


def trace(
    module: Module, inputs: Mapping[str, str | Type], name: str = "forward", *,
    method: str | Callable[..., object] = "__call__", outputs: Sequence[str] | None = None, seed: int = 0,
    training: bool = False,
) -> Program:  # fmt: skip
    """The program of calling ``module`` with ``inputs``: name -> type, e.g. ``{"tokens": "i64[b, s]"}``.

    ``method``: the name of another method to call, or a function that uses the module.

    Inputs are passed by keyword where the method has parameters of those names, else by position. The result is a
    Tensor, or a tuple or dictionary of them; ``outputs`` names them (default: the dictionary's keys, or the values'
    own names). Parameters are random sources (``seed``) until replaced: ``program.params[name] = ...``. ``training``
    turns dropout on.

    Raises TypeMismatch at the user's line where shapes or element types do not fit.
    """
    if not isinstance(module, Module):
        raise IRError(f"nn.trace runs an object of a class derived from nn.Module, not {module!r}")
    call = getattr(module, method, None) if isinstance(method, str) else method
    if call is None:
        raise IRError(f"{type(module).__name__} has no {method}: the method that nn.trace runs, by default __call__")
    graph = Graph(name)
    t = Trace(graph, type(module).__name__, trace.__code__, training)
    for path, x in module.walk():
        (t.parameter_names if isinstance(x, Parameter) else t.module_paths)[id(x)] = path
    args = {k: Tensor(t, graph.add_input(k, _type(k, v))) for k, v in inputs.items()}
    signature = inspect.signature(call)
    accepted = signature.parameters
    by_name = all(k in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()) for k in args)
    try:
        bound = signature.bind(**args) if by_name else signature.bind(*args.values())
    except TypeError as e:
        called = f"{type(module).__name__}.{method}" if isinstance(method, str) else repr(method)
        raise IRError(
            f"{called} takes {', '.join(accepted)}; given are {', '.join(args) or 'no inputs'}: {e}"
        ) from None
    token = _current.set(t)
    try:
        result = call(*bound.args, **bound.kwargs)
        values, names = _outputs(t, result, outputs)
    finally:
        _current.reset(token)
    graph.set_outputs(values, names)
    sources = random_params(module, seed)
    return Program({name: graph}, {k: sources[k] for k in graph.params})


def add_loss(
    program: Program, loss: Callable[..., object], inputs: Mapping[str, str | Type], *, graph: str = "forward",
    name: str = "loss",
) -> Graph:  # fmt: skip
    """Adds @name to ``program``, to be trained: @graph with more ``inputs``, and what ``loss`` makes of them as outputs.

    ``loss`` is a function written with ``nn``. Its parameters are named as inputs and outputs of @graph and as ``inputs``:
    ``lambda logits, labels: nn.cross_entropy(logits, labels)``. It returns the loss, a scalar, or a dictionary whose first is.

    Raises IRError for a parameter that is none of those, TypeMismatch at the user's line where shapes do not fit.
    """
    if name in program.graphs:
        raise IRError(f"the program has a graph @{name}; give the loss another name")
    g = program[graph].clone(name)
    root = getattr(loss, "__name__", "loss")
    t = Trace(g, root, add_loss.__code__, False)
    known = {v.name: v for v in g.inputs} | dict(zip(g.output_names, g.outputs))
    for key, given in inputs.items():
        if key in known:
            raise IRError(f"@{graph} has an input or output {key} already; give the input of the loss another name")
        known[key] = g.add_input(key, _type(key, given))
    wanted = inspect.signature(loss).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in wanted):
        chosen = list(known)
    else:
        chosen = [p.name for p in wanted if p.name in known or p.default is p.empty]
    if lacking := [k for k in chosen if k not in known]:
        raise IRError(f"{root} takes {', '.join(lacking)}; @{graph} and the inputs have {', '.join(known)}")
    token = _current.set(t)
    try:
        made = loss(**{k: Tensor(t, known[k]) for k in chosen})
        values, names = _outputs(t, made, ["loss"] if isinstance(made, Tensor) else None)
    finally:
        _current.reset(token)
    if not values or values[0].shape != ():
        got = values[0] if values else "nothing"
        raise IRError(f"{root} returned {got}; its first result is the loss, a scalar: take .mean()")
    g.set_outputs(values, names)
    program.graphs[name] = g
    return g


def _type(name: str, given: str | Type) -> Type:
    if isinstance(given, (TensorType, QTensorType)):
        return given
    if not isinstance(given, str):
        raise IRError(f'input {name}: a type is written like "f32[b, s, 64]", not {given!r}')
    try:
        return ir.parse_type(given)
    except ir.ParseError as e:
        raise IRError(f"input {name}: {e}") from None


def _outputs(t: Trace, result: object, names: Sequence[str] | None) -> tuple[list[ir.Value], list[str]]:
    if isinstance(result, dict):
        names = list(result) if names is None else names
        result = tuple(result.values())
    items = result if isinstance(result, (tuple, list)) else (result,)
    for x in items:
        if not isinstance(x, Tensor):
            raise IRError(f"{t.root} returned {x!r}; a module returns a Tensor, or a tuple or dictionary of Tensors")
        if x.trace is not t:
            raise IRError(f"{t.root} returned {x!r}, which belongs to another trace")
    values = [x.value for x in items]
    if names is None:
        names = [v.name for v in values]
        names = [n if n not in names[:i] else f"{n}_{i}" for i, n in enumerate(names)]
    if len(names) != len(values):
        raise IRError(f"{t.root} returned {len(values)} tensors; outputs= names {len(names)}: {', '.join(names)}")
    return values, list(names)


def is_training() -> bool:
    """Whether the running trace has dropout on."""
    return current("nn.is_training").training
