"""A graph of a program as an ONNX file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import defs, helper
from wasat.ir import Builder, DType, Graph, IRError, Program, QTensorType, TensorType, Value
from wasat.ir.decompose import decompose
from wasat.ir.ops.linear_attention import LinearAttention, LinearAttentionAttrs

from . import composites, loops, primitives  # noqa: F401  (fill the table)
from .emitter import CODE, Emitter, Options, Weight, value_info
from .errors import ExportError, Unsupported
from .masks import prepare
from .registry import OLDEST, emission

NEWEST = defs.onnx_opset_version()
DEFAULT = 24
"""The operator set that has every fused operator (Attention, RMSNormalization, RotaryEmbedding, TensorScatter, Swish)."""
EXTERNAL = 1 << 30
"""Parameters of more bytes than this lie in a file beside the model: protobuf ends at 2 GiB."""
ALIGN = 4096
INLINE = 1024
"""Tensors up to this many bytes stay in the model even if the others do not."""


def to_onnx(
    program: Program | Graph, path: str | Path, *, graph: str | None = None, opset: int = DEFAULT,
    external_data: bool | None = None, matmul_nbits: bool = False,
) -> Path:  # fmt: skip
    """Writes one graph of ``program`` (default: its only one, or ``forward``) as the ONNX file ``path``; returns the path.

    Inputs, outputs, parameters and symbolic sizes keep their names (an output named like an input gets ``_out``); nodes take
    theirs from the values they make, or from the ONNX nodes they were imported from, and tell in ``doc_string`` where they
    were written. Fused operations are standard operators where ``opset`` (17 to the newest that the installed onnx knows) has
    them, else what they are made of. Quantized weights stay quantized: DequantizeLinear with blocks (from opset 21 on; before,
    a byte a value and a product with the scales), or, for ``matmul_nbits``, onnxruntime's ``com.microsoft.MatMulNBits`` and
    ``GatherBlockQuantized``.

    ``external_data``: parameters in ``<path>.data``, streamed one at a time; None: if they exceed 1 GiB. The files are checked
    (onnx.checker, full) and then renamed into place: complete or absent.

    Raises ExportError for an opset or graph that there is not; for operations that ONNX cannot express: all of them, with
    counts and names, before any parameter is read; and for what onnx.checker refuses. Runtime checks of sizes
    (``Node.checks``) have no ONNX form and are left out.
    """
    if isinstance(program, Graph):
        program = Program({program.name: program})
    if not OLDEST <= opset <= NEWEST:
        raise ExportError(f"operator set {opset} cannot be exported; {OLDEST} to {NEWEST} can")
    source = _chosen(program, graph)
    emitter, model = build(program, source, Options(opset, matmul_nbits))
    weights = list(emitter.weights.values())
    if external_data is None:
        external_data = sum(w.nbytes for w in weights) > EXTERNAL
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        beside = f"{target.name}.data"
        _write_weights(model, weights, folder / beside if external_data else None)
        (folder / target.name).write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(str(folder / target.name), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
            raise ExportError(f"onnx.checker refuses what graph @{source.name} becomes: {e}") from None
        for name in (beside, target.name):  # the model last: it must not name what is not there
            if (folder / name).exists():
                os.replace(folder / name, target.parent / name)
    finally:
        shutil.rmtree(folder)
    return target


def _chosen(program: Program, name: str | None) -> Graph:
    if name is None and len(program.graphs) == 1:
        return next(iter(program.graphs.values()))
    name = name or "forward"
    if name not in program.graphs:
        raise ExportError(f"there is no graph {name!r} to export; choose one of {', '.join(program.graphs)}")
    return program.graphs[name]


def _by_tokens(graph: Graph, options: Options) -> None:
    """Linear attention that has no operator becomes a Scan over tokens, which readers know again, rather than over blocks."""
    for node in list(graph.nodes):
        if isinstance(node.op, LinearAttention) and emission(node, options) is None:
            made = node.op.turns(Builder(graph, before=node, loc=node.loc), LinearAttentionAttrs.of(node), *node.inputs)
            graph.replace(node, made)


def build(program: Program, source: Graph, options: Options) -> tuple[Emitter, onnx.ModelProto]:
    """The model without the numbers of its parameters, which the emitter lists. Raises ExportError for what has no form."""
    graph = source.clone()
    if options.opset >= 23:
        prepare(graph)
    _by_tokens(graph, options)
    decompose(graph, lambda node: emission(node, options) is not None)

    def load(name: str) -> object:
        if name not in program.params:
            raise ExportError(f"parameter {name} has no numbers: export the program that holds its parameters")
        return program.params[name].load()

    e = Emitter(graph, options, load=load)
    failures: dict[str, list[str]] = {}
    for v in graph.inputs:
        e.reserve(v.name)
        _declare(e, v, v.name)
        if isinstance(v.type, QTensorType):
            failures.setdefault("a quantized input (only parameters can be quantized)", []).append(v.name)
    output_names = _output_names(graph)
    wanted = _names(graph, output_names, e)
    for node in graph.nodes:
        e.at(node)
        since = len(e.nodes)
        names = [wanted[v] for v in node.outputs]
        try:
            form = emission(node, options)
            if form is None:
                raise Unsupported(f"operator set {options.opset} cannot express it")
            out = form.emit(e, node, *(e.operand(v) for v in node.inputs))
            e.bind(node, [out] if isinstance(out, str) else out, since, names)
        except Unsupported as x:
            failures.setdefault(f"{node.op.name}: {x}", []).append(node.outputs[0].name)
            for v, name in zip(node.outputs, names):
                _declare(e, v, name)  # so that every failure after it is found
    outputs = []
    for v, name in zip(graph.outputs, output_names):
        own = e.operand(v)
        if own != name and not failures:
            e.nodes.append(helper.make_node("Identity", [own], [name], name=e.node_name(name)))
        if isinstance(v.type, QTensorType):
            failures.setdefault("a quantized output (only parameters can be quantized)", []).append(name)
        else:
            outputs.append(value_info(name, v.type))
    if failures:
        lines = [
            f"  {what}: {len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
            for what, names in sorted(failures.items(), key=lambda kv: (-len(kv[1]), kv[0]))
        ]
        raise ExportError(f"graph @{source.name} cannot be exported:\n" + "\n".join(lines))
    read = set(_reads([*e.sizes, *e.nodes]))
    e.weights = {name: w for name, w in e.weights.items() if name in read}  # some emissions repack theirs
    made = {name for n in e.nodes for name in n.output} - set(output_names)
    infos = [
        value_info(e.names[v], v.type) for n in graph.nodes for v in n.outputs
        if e.names[v] in made and isinstance(v.type, TensorType)
    ]  # fmt: skip
    unique = {info.name: info for info in infos}
    proto = helper.make_graph(
        [*e.constants, *e.sizes, *e.nodes], source.name, [value_info(v.name, v.type) for v in graph.inputs], outputs,
        value_info=list(unique.values()),
    )  # fmt: skip
    imports = [helper.make_opsetid("", options.opset), *(helper.make_opsetid(d, 1) for d in sorted(e.domains))]
    model = helper.make_model(
        proto, opset_imports=imports, producer_name="wasat", ir_version=helper.find_min_ir_version_for(imports, True)
    )
    return e, model


def _reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The values that nodes read, those in their bodies included."""
    for n in nodes:
        yield from n.input
        for a in n.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from _reads(a.g.node)


def _declare(e: Emitter, v: Value, name: str) -> None:
    """``name`` for a value that no emission made."""
    e.names[v] = name
    if isinstance(v.type, TensorType):
        e.dtype[name] = v.type.dtype
    else:
        e.dtype[name], e.scale_names[v] = e.integer(v.type), f"{name}.scales"
        e.dtype[e.scale_names[v]] = v.type.scale
        if v.type.offset:
            e.offset_names[v] = f"{name}.offsets"
            e.dtype[e.offset_names[v]] = DType.F32
        if v.type.zeros:
            e.zero_names[v] = f"{name}.zeros"
            e.dtype[e.zero_names[v]] = DType.I8


def _output_names(graph: Graph) -> list[str]:
    """The outputs' names; one that an input has (a cache, in and out) ends in ``_out``, for ONNX names every value once."""
    given = {v.name for v in graph.inputs} | set(graph.params)
    names = []
    for name in graph.output_names:
        while name in given:
            name += "_out"
        names.append(name)
        given.add(name)
    return names


def _names(graph: Graph, output_names: list[str], e: Emitter) -> dict[Value, str]:
    """The ONNX name of each node's results: an output's own, else the value's; never an input's or a parameter's."""
    outputs = dict(zip(graph.outputs, output_names))
    for name in (*graph.params, *output_names):
        e.reserve(name)
    wanted: dict[Value, str] = {}
    for node in graph.nodes:
        for v in node.outputs:
            wanted[v] = outputs[v] if v in outputs else e.fresh(v.name)
    return wanted


def _bytes(w: Weight) -> np.ndarray:
    """The file's bytes of a tensor: row-major, little-endian, small integers packed from the low bits up."""
    x = np.ascontiguousarray(w.load())
    if w.dtype.bits >= 8:
        return x.reshape(-1).view(np.uint8)
    per, mask = 8 // w.dtype.bits, (1 << w.dtype.bits) - 1
    flat = x.reshape(-1).view(np.uint8) & mask
    flat = np.concatenate([flat, np.zeros(-len(flat) % per, np.uint8)])
    out = np.zeros(len(flat) // per, np.uint8)
    for i in range(per):
        out |= flat[i::per] << (i * w.dtype.bits)
    return out


def _write_weights(model: onnx.ModelProto, weights: list[Weight], beside: Path | None) -> None:
    """Initializers into the model, or into the file ``beside`` at aligned offsets; one tensor in memory at a time."""
    if beside is None:
        for w in weights:
            model.graph.initializer.append(_tensor(w, _bytes(w).tobytes()))
        return
    with beside.open("wb") as f:
        for w in weights:
            if w.nbytes <= INLINE:
                model.graph.initializer.append(_tensor(w, _bytes(w).tobytes()))
                continue
            f.seek(-f.tell() % ALIGN, os.SEEK_CUR)
            t = _tensor(w, None)
            t.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", beside.name), ("offset", f.tell()), ("length", w.nbytes)):
                t.external_data.add(key=key, value=str(value))
            _bytes(w).tofile(f)
            model.graph.initializer.append(t)


def _tensor(w: Weight, data: bytes | None) -> onnx.TensorProto:
    t = onnx.TensorProto(name=w.name, data_type=CODE[w.dtype], dims=w.shape)
    if data is not None:
        if len(data) != w.nbytes:
            raise IRError(f"parameter {w.name} has {len(data)} bytes; {w.dtype}{list(w.shape)} needs {w.nbytes}")
        t.raw_data = data
    return t


__all__ = ["DEFAULT", "NEWEST", "OLDEST", "build", "to_onnx"]
