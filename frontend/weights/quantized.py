"""Checkpoints that a ``quantization_config`` describes: their weights in our own types, and the graph that reads them so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from wasat.ir import (
    ArrayParam,
    Builder,
    CheckpointError,
    Graph,
    ParamSource,
    Program,
    QArray,
    QTensorType,
    TensorType,
    Value,
    type_of,
)

from ..models import Fields
from ..models.layout import Laid
from .methods import METHODS, Method
from .packed import Dense, Integers, Tensors
from .safetensors import STORED, Stored, listed, read_json
from .storage import store_as

_INSTEAD = {
    "bitsandbytes": "load it with transformers, model.dequantize(), and save_pretrained, or take the original, unquantized one",
}


@dataclass
class Checkpoint:
    """The quantized weights of a checkpoint."""

    sources: dict[str, ParamSource] = field(default_factory=dict)
    """By the parameter's name."""
    orders: dict[str, np.ndarray] = field(default_factory=dict)
    """Of weights whose steps of k stand in another order."""
    dense: dict[str, str] = field(default_factory=dict)
    """Why weights became f32."""
    used: set[str] = field(default_factory=set)
    """Tensors that are accounted for."""


def method_of(config: Mapping[str, Any], where: str) -> Method | None:
    """The format that a configuration names; None where weights are not quantized. Raises ConfigError for what is not read."""
    given = Fields(config, where).take("quantization_config", dict, None)
    if given is None:
        return None
    f = Fields(given, f"{where}: quantization_config")
    name = f.take("quant_method", str)
    if name not in METHODS:
        remedy = _INSTEAD.get(name, "use the original, unquantized one")
        raise f.fail(f"the checkpoint is quantized by {name}, which is not read ({', '.join(METHODS)} are); {remedy}")
    return METHODS[name](f)


def older_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, with what AutoGPTQ once wrote beside it."""
    beside = folder / "quantize_config.json"
    if config.get("quantization_config") is None and beside.exists():
        return {**config, "quantization_config": {"quant_method": "gptq", **read_json(beside)}}
    return dict(config)


def read_quantized(
    method: Method, wanted: Mapping[str, TensorType], found: Mapping[str, Stored], where: Path,
    elsewhere: Mapping[str, Sequence[str] | Laid] = {},
) -> Checkpoint:  # fmt: skip
    """The weights of all modules that are quantized; ``elsewhere``: parameters that are parts of tensors, or stacks of the
    weights of several modules. What does not fit is named at once."""
    laid = {name: to for name, to in elsewhere.items() if isinstance(to, Laid)}
    stacks = {name: to for name, to in elsewhere.items() if name in wanted and not isinstance(to, Laid)}
    given, wanted = wanted, dict(wanted)
    for name, to in stacks.items():
        whole = given[name]
        wanted |= dict.fromkeys(to, TensorType(whole.dtype, whole.shape[1:]) if whole.rank == 3 else whole)
    parts: dict[str, dict[str, Stored]] = {}
    for name, stored in found.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = stored
    out = Checkpoint()
    parts_of, out.used, problems = method.read_parts(laid, given, found)
    out.sources |= parts_of
    for module, tensors in parts.items():
        weight = f"{module}.weight"
        if weight not in wanted or not any(mark in tensors for mark in method.marks):
            continue
        n, k = wanted[weight].concrete({})
        t = Tensors(module, tensors, (n, k))
        try:
            got = method.read(t)
        except CheckpointError as e:
            problems.append(str(e))
            continue
        out.sources[weight] = got.source
        if got.order is not None:
            out.orders[weight] = got.order
        if got.why is not None:
            out.dense[weight] = got.why
        if f"{module}.bias" not in wanted and (bias := tensors.get("bias")) is not None and _all_zero(bias):
            t.drop("bias")  # packers give one to every linear
        out.used |= {f"{module}.{part}" for part in t.used}
    for name, to in stacks.items():
        problems += _stack(out, name, to, given[name])
    if problems:
        raise CheckpointError(f"{where}: quantized weights do not fit config.json:\n{listed(problems)}")
    return out


def _stack(out: Checkpoint, name: str, weights: Sequence[str], type: TensorType) -> list[str]:
    """Makes one parameter of the weights of several modules, where these are quantized; what does not fit."""
    parts = {w: out.sources.pop(w) for w in weights if w in out.sources}
    orders = {w: out.orders.pop(w) for w in weights if w in out.orders}
    why = next(iter([out.dense.pop(w) for w in weights if w in out.dense]), None)
    if not parts:
        return []
    if len(parts) < len(weights):
        plain = next(w for w in weights if w not in parts)
        return [f"{plain.removesuffix('.weight')}: it is not quantized, and others of its stack are, as {next(iter(parts))}"]
    sources = [parts[w] for w in weights]
    first = sources[0]
    if type.rank == 2:
        out.sources[name] = first
        for order in orders.values():
            out.orders[name] = order
    elif isinstance(first, Integers) and not orders and all(s.type == first.type for s in sources):
        stack = replace(first.type, shape=type.shape)
        out.sources[name] = Integers(stack, partial(_stacked, stack, sources))
    else:
        out.sources[name] = Dense(type, partial(_dense, type, sources, [orders.get(w) for w in weights]))
        why = why or "its parts are stored otherwise each, or in an order of their own"
    if why is not None and isinstance(out.sources[name], Dense):
        out.dense[name] = why
    return []


def _stacked(type: QTensorType, sources: Sequence[Any]) -> QArray:
    each = [s.load() for s in sources]
    zeros = None if each[0].zeros is None else np.stack([np.asarray(q.zeros) for q in each])
    values, scales = (np.stack([np.asarray(getattr(q, part)) for q in each]) for part in ("values", "scales"))
    return QArray(type, values, scales, zeros)


def _dense(type: TensorType, sources: Sequence[Any], orders: Sequence[np.ndarray | None]) -> np.ndarray:
    out = np.empty(type.concrete({}), np.float32)
    for x, source, order in zip(out, sources, orders):
        loaded = source.load()
        numbers = loaded.dense() if isinstance(loaded, QArray) else loaded
        x[:, slice(None) if order is None else order] = numbers
    return out


def _all_zero(x: Stored) -> bool:
    return x.dtype in STORED and not np.asarray(x.load()).astype(np.float32).any()


def read_as_stored(program: Program, name: str, found: Checkpoint) -> None:
    """Lets graph ``forward`` read the weights in the types that they have; steps in another order are taken so from x."""
    graph = program[name]
    params: dict[bytes, Value] = {}
    taken: dict[tuple[Value, Value], Value] = {}
    for weight, source in found.sources.items():
        order = found.orders.get(weight)
        program.params[weight] = source
        if order is not None:
            _take_in_order(program, graph, weight, order, params, taken)
        if isinstance(source, Integers):
            store_as(graph, weight, source.type)


def _take_in_order(
    program: Program, graph: Graph, weight: str, order: np.ndarray, params: dict[bytes, Value],
    taken: dict[tuple[Value, Value], Value],
) -> None:  # fmt: skip
    """x @ w^T, the steps of w being in ``order``: x's are brought into the same one. Equal orders are one parameter."""
    key = order.tobytes()
    if key not in params:
        at = f"{weight.removesuffix('.weight')}.order"
        numbers = order.astype(np.int32)
        program.params[at] = ArrayParam(numbers, type_of(numbers))
        params[key] = graph.add_param(at, type_of(numbers))
    for node, i in list(graph.params[weight].uses):
        if not node.is_a("linear") or i != 1:
            raise CheckpointError(f"{weight} is in an order of its own (act-order), and {node!r} reads it")
        x = node.inputs[0]
        if (x, params[key]) not in taken:
            first = next(n for n in graph.nodes if x in n.inputs)
            b = Builder(graph, before=first, loc=node.loc)
            taken[x, params[key]] = b.gather(x, params[key], axis=len(x.shape) - 1)
        graph.set_inputs(node, (taken[x, params[key]], *node.inputs[1:]))
