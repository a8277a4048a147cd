"""From a parsed model to a program: nodes in order through the converters, functions inlined, control flow unrolled."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from wasat.ir import (
    ArrayParam,
    Dim,
    DimError,
    DimLike,
    Graph,
    Interface,
    IRError,
    Loc,
    Origin,
    ParamSource,
    Program,
    TensorType,
    Value,
    parse_dim,
    substitute,
    symbol,
    type_of,
)
from wasat.ir.dims import names_dimension
from wasat.ir.repacked import Repacked

from .emit import Dims, Emitter
from .errors import FromData, OnnxError
from .files import CODE, Source, array, element, parameter
from .pasts import leave_off, pasts, same_length
from .registry import ATTRIBUTES, Inline, NodeView, converter, domain_of, schema_of
from .sequences import Appended, Rows
from .supported import check_supported
from .undecided import reads
from .values import wrong_value

OLDEST, NEWEST = 7, 28
"""Operator sets read. Before them, operators that are defined the same."""
MOST_NODES = 1_000_000
SMALL = 64
"""Integer initializers up to this many elements are constants, not parameters: they are sizes, axes, scalars."""
MERGED = "use_cache_branch"
"""The input by which optimum's merged decoders choose between graphs with a past and without, whose outputs differ in type."""

LEFT_OUT = frozenset({("Resize", "roi"), ("Resize", "scales")})
"""Inputs that an older operator set asks for where they mean nothing; files leave them out, and onnxruntime reads those."""

MALFORMED = (DimError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What code that trusts a file's fields meets where they are not what they should be."""

Env = MutableMapping[str, Any]


@dataclass
class Frame:
    """Where a node is executed: values by name, operator sets, the attributes of the function around it."""

    env: Env
    opsets: Mapping[str, int]
    attrs: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    scope: str = ""
    depth: int = 0


class Importer:
    """One import. ``constants``: inputs that are fixed to numbers; ``types``: inputs whose type is other than declared (a list
    of types for a sequence, None for an empty optional). ``sizes``: symbolic sizes that are fixed to numbers.
    """

    def __init__(
        self, source: Source, constants: Mapping[str, np.ndarray], types: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> None:  # fmt: skip
        self.source, self.constants, self.types, self.sizes = source, constants, types, sizes
        self.graph = Graph("forward")
        self.params: dict[str, ParamSource] = {}
        self.c = Emitter(self.graph, self.params)
        self.repacked = Repacked(self.params)
        self.dense: dict[str, str] = {}
        """Weights of integers that the graph dequantizes, and why."""
        self.functions = {(domain_of(f.domain), f.name, f.overload): f for f in source.model.functions}
        self.symbols: dict[str, str] = {}
        self.count = 0
        self.declared: set[str] = set()

    def fail(self, message: str) -> OnnxError:
        return OnnxError(f"{self.source.name}: {message}")

    def run(self) -> Program:
        try:
            return self._program()
        except IRError as e:
            raise self.fail(e.message) from e
        except MALFORMED as e:
            raise self.fail(f"the file is damaged: {e}") from e

    def _program(self) -> Program:
        model = self.source.model
        if not model.HasField("graph"):
            raise self.fail("the model has no graph; the file is damaged or truncated")
        opsets = self.opsets(model.opset_import)
        for info in model.graph.input:
            t = info.type.tensor_type
            if info.name == MERGED and t.elem_type == onnx.TensorProto.BOOL and MERGED not in self.types:
                self.constants = {MERGED: np.zeros([1] * len(t.shape.dim), np.bool_), **self.constants}
        check_supported(self, model.graph, opsets)
        self.declared = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim}
        env: Env = {}
        initialized = self._initializers(model.graph, env)
        past, presents = pasts(model.graph, {*self.constants, *self.types})
        if past:
            self.symbols |= {long: str(self._dim(n)) for long, n in same_length(model.graph).items() if n not in self.sizes}
        for info in model.graph.input:
            if info.name in past:
                env[info.name] = None
            elif info.name not in initialized:
                self._input(info, env)
        self._check_fixed(model.graph, initialized)
        frame = Frame(env, opsets)
        self._nodes(model.graph, frame)
        structure = []
        outputs: list[Value] = []
        names: list[str] = []
        for info in model.graph.output:
            if info.name in presents:
                continue
            result = self._lookup(info.name, frame, "the graph's outputs")
            if isinstance(result, Rows):
                raise self.fail(f"output {info.name!r} is a sequence of {result.length()} tensors; join them in the model")
            items = result if isinstance(result, list) else [] if result is None else [result]
            structure.append((info.name, len(items) if isinstance(result, list) else None if items else 0))
            outputs += [self.c.value(x) for x in items]
            names += [f"{info.name}.{i}" for i in range(len(items))] if isinstance(result, list) else [info.name] * len(items)
        self.graph.set_outputs(outputs, names)
        if past:
            leave_off(self.graph)
        for name in self.graph.prune_params():
            del self.params[name]
        origin = Origin(outputs=tuple(structure), dequantized=self.dense)
        return Program({"forward": self.graph}, self.params, Interface(model.graph.name or "model"), origin)

    # -- what the model declares -------------------------------------------------------------------------------------------
    def opsets(self, imports: Sequence[onnx.OperatorSetIdProto]) -> dict[str, int]:
        opsets = {domain_of(o.domain): o.version for o in imports}
        version = opsets.setdefault("", NEWEST)
        if any(not 0 < v < 2**31 for k, v in opsets.items() if k):
            raise self.fail(f"the versions of the operator sets, {opsets}, make no sense")
        if not 1 <= version <= NEWEST:
            raise self.fail(f"operator set {version} is not supported; {OLDEST} to {NEWEST} are")
        return opsets

    def _initializers(self, graph: onnx.GraphProto, env: Env, prefix: str = "") -> set[str]:
        if graph.sparse_initializer:
            raise self.fail("sparse initializers are not supported; store them dense")
        for t in graph.initializer:
            if t.name in env and not prefix:
                raise self.fail(f"initializer {t.name!r} is given twice")
            source = parameter(t, self.source)
            type = source.type
            assert isinstance(type, TensorType)
            count = type.size
            if count == 1 or (not type.dtype.is_float and isinstance(count, int) and count <= SMALL):
                env[t.name] = np.asarray(source.load())
            else:
                self.params[prefix + t.name] = source
                env[t.name] = self.graph.add_param(prefix + t.name, type)
        return {t.name for t in graph.initializer}

    def _check_fixed(self, graph: onnx.GraphProto, initialized: Container[str]) -> None:
        """Refuses sizes and constants that the model lacks."""
        inputs = [i.name for i in graph.input if i.name not in initialized]
        for what, given, there in (
            ("size", self.sizes, [*self.symbols, *self.symbols.values()]), ("input", self.constants, inputs)
        ):  # fmt: skip
            lacking = [name for name in given if name not in there]
            if lacking:
                names = ", ".join(dict.fromkeys(there)) or "none"
                raise self.fail(f"there is no {what} {lacking[0]!r} to be fixed; there are {names}")

    def stored(self, name: str, array: np.ndarray) -> Value:
        """A parameter of these numbers. A node that is executed again finds its own."""
        unique, i = name, 0
        while (source := self.params.get(unique)) is not None:
            type = source.type
            if isinstance(source, ArrayParam) and type == type_of(array) and np.array_equal(np.asarray(source.load()), array):
                break
            i += 1
            unique = f"{name}_{i}"
        else:
            self.params[unique] = ArrayParam(array, type_of(array))
        return self.graph.add_param(unique, self.params[unique].type)

    def _input(self, info: onnx.ValueInfoProto, env: Env) -> None:
        name = info.name
        if name in self.constants:
            number = np.asarray(self.constants[name])
            t = info.type.tensor_type
            fills = number.ndim == 0 and t.HasField("shape") and len(t.shape.dim) > 0
            env[name] = self.c.full(self._shape(t.shape, name), number.item(), element(t.elem_type, name)) if fills else number
            return
        if name in self.types:
            given = self.types[name]
            if isinstance(given, (list, tuple)):
                env[name] = [self.graph.add_input(f"{name}.{i}", t) for i, t in enumerate(given)]
            else:
                env[name] = None if given is None else self.graph.add_input(name, given)
            return
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            raise self.fail(f"input {name!r} is a {(kind or 'value without a type').replace('_type', '')}; give its type(s)")
        t = info.type.tensor_type
        if not t.HasField("shape"):
            raise self.fail(f"input {name!r} has no shape: its rank must be known")
        env[name] = self.graph.add_input(name, TensorType(element(t.elem_type, f"input {name!r}"), self._shape(t.shape, name)))

    def _shape(self, shape: onnx.TensorShapeProto, name: str) -> tuple[DimLike, ...]:
        out: list[DimLike] = []
        for i, d in enumerate(shape.dim):
            if d.HasField("dim_value") and d.dim_value >= 0:
                out.append(d.dim_value)
            else:
                # "?" is no name: each is an unknown of its own
                named = d.dim_param if re.search(r"[^\W\d]", d.dim_param) else ""
                out.append(self._dim(named or f"{name}_{i}"))
        return tuple(out)

    def _dim(self, text: str) -> DimLike:
        """A symbolic size by its ONNX name, or the expression it spells."""
        names = re.findall(r"[A-Za-z_]\w*", text)
        if not text.isidentifier() and names and len(text) < 200 and all(n in self.declared for n in names):
            try:
                size = parse_dim(text)
            except DimError:
                size = 0
            if isinstance(size, Dim):
                return substitute(size, {n: self._dim(n) for n in names})
        if text not in self.symbols:
            plain = re.sub(r"\W", "_", text, flags=re.ASCII) or "n"
            plain = plain if names_dimension(plain) else f"n_{plain}"
            while plain in self.symbols.values():
                plain += "_"
            self.symbols[text] = plain
        plain = self.symbols[text]
        return next((self.sizes[name] for name in (text, plain) if name in self.sizes), symbol(plain))

    # -- execution ---------------------------------------------------------------------------------------------------------
    def _nodes(self, graph: onnx.GraphProto | onnx.FunctionProto, frame: Frame) -> None:
        for node in graph.node:
            inputs = [self._lookup(name, frame, f"{node.op_type} node {node.name!r}") if name else None for name in node.input]
            for name, result in zip(node.output, self._node(node, inputs, frame)):
                if name in frame.env and name in getattr(frame.env, "maps", [frame.env])[0]:
                    raise self.fail(f"{name!r} is made twice; every value has one producer")
                if name:
                    frame.env[name] = result

    def _lookup(self, name: str, frame: Frame, who: str) -> Any:
        if name not in frame.env:
            raise self.fail(
                f"{who} reads {name!r}, which nothing before it makes: the nodes are not in order, or form a cycle"
            )
        return frame.env[name]

    def _node(self, node: onnx.NodeProto, inputs: list[Any], frame: Frame) -> Sequence[Any]:
        self.count += 1
        if self.count > MOST_NODES:
            raise self.fail(f"more than {MOST_NODES} nodes, once functions are inlined and loops unrolled")
        domain = domain_of(node.domain)
        function = self.functions.get((domain, node.op_type, node.overload))
        scope = node.name or (node.output[0] if node.output else node.op_type)
        loc = Loc(self.source.name, None, scope=f"{frame.scope}/{scope}" if frame.scope else scope)
        outer, self.c.b.loc = self.c.b.loc, loc
        last = self.graph.last
        try:
            if function is not None:
                return self._call(function, node, inputs, frame, self.opsets(function.opset_import))
            schema = schema_of(node.op_type, frame.opsets.get(domain, 0), domain)
            version = schema.since_version if schema is not None else frame.opsets.get(domain, 1)
            convert = converter(domain, node.op_type, version)
            attrs = self._attributes(node, frame, schema)
            if convert is None:
                return self._inline_schema(schema, node, inputs, frame)
            self._check_operands(node, scope, inputs, schema)
            view = NodeView(node, attrs, frame, self)
            while inputs and inputs[-1] is None:
                inputs.pop()
            try:
                result = convert(self.c, view, *inputs)
            except Inline:
                return self._inline_schema(schema, node, inputs, frame)
        except FromData as e:
            raise FromData(self._at(node, scope, e), e.inputs) from None
        except OnnxError as e:
            raise OnnxError(self._at(node, scope, e)) from e.__cause__
        except IRError as e:
            raise OnnxError(f"{self.source.name}: {node.op_type} node {scope!r}: {e.message}") from e
        except MALFORMED as e:
            raise OnnxError(f"{self.source.name}: {node.op_type} node {scope!r} is malformed: {e}") from e
        finally:
            self.c.b.loc = outer
        results = result if isinstance(result, tuple) else (result,)
        lacking = [name for name in node.output[len(results) :] if name]
        if lacking:
            raise self.fail(f"{node.op_type} node {scope!r}: its output {lacking[0]!r} is not supported")
        self._name(results, node.output, last)
        return results

    def _at(self, node: onnx.NodeProto, scope: str, e: OnnxError) -> str:
        """The message, with the node that it is about."""
        text, where = str(e).removeprefix(f"{self.source.name}: "), f"{node.op_type} node {scope!r}"
        return f"{self.source.name}: {text if where in text else f'{where}: {text}'}"

    def _check_operands(self, node: onnx.NodeProto, scope: str, inputs: Sequence[Any], schema: Any) -> None:
        if schema is None:
            known = ATTRIBUTES.get((domain_of(node.domain), node.op_type))
            for a in node.attribute:
                if known is not None and a.name not in known:
                    raise self.fail(f"{node.op_type} node {scope!r} has an attribute {a.name}, which is not understood")
            return
        version = f"{node.op_type} of operator set {schema.since_version}"
        if not schema.min_input <= len(inputs) <= schema.max_input or len(node.output) > schema.max_output:
            raise self.fail(
                f"{node.op_type} node {scope!r} has {len(inputs)} inputs and {len(node.output)} outputs; {version} takes "
                f"{schema.min_input} to {schema.max_input} and makes up to {schema.max_output}"
            )
        for a in node.attribute:
            if a.name not in schema.attributes:
                raise self.fail(f"{node.op_type} node {scope!r} has an attribute {a.name}, which {version} has not")
        for given, name, declared in zip(inputs, node.input, schema.inputs):
            optional = declared.option is not onnx.defs.OpSchema.FormalParameterOption.Single or "optional" in declared.type_str
            optional = optional or (node.op_type, declared.name) in LEFT_OUT
            if given is None and not name and not optional:
                raise self.fail(f"{node.op_type} node {scope!r} lacks the input {declared.name}")

    def _name(self, results: Sequence[Any], names: Sequence[str], last: Any) -> None:
        """Gives the values that a node made their ONNX names."""
        fresh = set()
        n = self.graph.last
        while n is not None and n is not last:
            fresh.add(n)
            n = n.prev
        for v, name in zip(results, names):
            if name and isinstance(v, Value) and v.node in fresh and v.const is None:
                self.graph.rename(v, name)

    def _attributes(self, node: onnx.NodeProto, frame: Frame, schema: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if schema is not None:
            for name, a in schema.attributes.items():
                if a.default_value.name:
                    out[name] = _plain(onnx.helper.get_attribute_value(a.default_value))
        for a in self._resolved(node, frame):
            if a.type in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.TENSORS):
                tensors = [array(t, self.source) for t in ([a.t] if a.type == onnx.AttributeProto.TENSOR else a.tensors)]
                out[a.name] = tensors[0] if a.type == onnx.AttributeProto.TENSOR else tensors
            else:
                try:
                    out[a.name] = _plain(onnx.helper.get_attribute_value(a))
                except ValueError as e:
                    raise self.fail(f"attribute {a.name} of {node.op_type} node {node.name!r}: {e}") from None
        if wrong := wrong_value(node.op_type, out):
            raise self.fail(f"{node.op_type} node {node.name or node.output[0]!r}: {wrong}")
        return out

    def _resolved(self, node: onnx.NodeProto, frame: Frame) -> Iterator[onnx.AttributeProto]:
        """The node's attributes, references to those of the function around it replaced by their values."""
        for a in node.attribute:
            if not a.ref_attr_name:
                yield a
            elif a.ref_attr_name in frame.attrs:
                own = onnx.AttributeProto()
                own.CopyFrom(frame.attrs[a.ref_attr_name])
                own.name = a.name
                yield own

    # -- functions and subgraphs -------------------------------------------------------------------------------------------
    def _call(
        self, f: onnx.FunctionProto, node: onnx.NodeProto, inputs: list[Any], frame: Frame, opsets: Mapping[str, int]
    ) -> list[Any]:
        if frame.depth > 64:
            raise self.fail(f"functions are nested too deeply at {node.op_type}")
        attrs = {a.name: a for a in f.attribute_proto}
        attrs.update({a.name: a for a in self._resolved(node, frame)})
        env = dict(zip(f.input, inputs + [None] * (len(f.input) - len(inputs))))
        scope = self.c.b.loc.scope if self.c.b.loc is not None else ""
        inner = Frame(env, opsets, attrs, scope, frame.depth + 1)
        self._nodes(f, inner)
        # an optional output that nobody asks for may not be made at all
        wanted = zip(f.output, node.output)
        return [self._lookup(name, inner, f"the result of function {f.name}") if out else None for name, out in wanted]

    def _inline_schema(
        self, schema: Any, node: onnx.NodeProto, inputs: list[Any], frame: Frame
    ) -> Sequence[Any]:
        assert schema is not None  # or _check_supported had refused it
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        del plain.attribute[:]
        own = list(self._resolved(node, frame))
        plain.attribute.extend(own)
        version = frame.opsets[""]
        f = onnx.FunctionProto()
        if schema.context_dependent_function_opset_versions:
            best = [v for v in schema.context_dependent_function_opset_versions if v <= version or domain_of(node.domain)]
            if not best:
                raise self.fail(f"{node.op_type} node {node.name!r} has no definition at operator set {version}")
            types = [_type_proto(x, self.c).SerializeToString() for x in inputs]
            body = schema.get_context_dependent_function_with_opset_version(max(best), plain.SerializeToString(), types)
            f.ParseFromString(body)
        else:
            f.CopyFrom(schema.function_body)
        defaults = {a.name: a.default_value for a in schema.attributes.values() if a.default_value.name}
        given = {a.name for a in own}
        plain.attribute.extend(v for k, v in defaults.items() if k not in given)
        opsets = {**frame.opsets, **{domain_of(o.domain): o.version for o in f.opset_import}}
        return self._call(f, plain, inputs, Frame({}, opsets, {}, frame.scope, frame.depth), opsets)

    def subgraph(self, graph: onnx.GraphProto, frame: Frame, inputs: Sequence[Any]) -> list[Any]:
        """The results of a subgraph; it sees the values around it."""
        if len(inputs) != len(graph.input):
            raise self.fail(f"subgraph {graph.name!r} takes {len(graph.input)} inputs and is given {len(inputs)}")
        env: Env = ChainMap(dict(zip((i.name for i in graph.input), inputs)), frame.env)
        local: Env = {}
        if graph.initializer:
            self._initializers(graph, local, prefix=f"{self.c.b.loc.scope}/" if self.c.b.loc is not None else "")
            env.update(local)
        inner = Frame(env, frame.opsets, frame.attrs, self.c.b.loc.scope if self.c.b.loc else "", frame.depth + 1)
        if inner.depth > 64:
            raise self.fail(f"subgraphs are nested too deeply at {graph.name!r}")
        self._nodes(graph, inner)
        return [self._lookup(o.name, inner, f"the result of subgraph {graph.name!r}") for o in graph.output]

    def body(
        self, graph: onnx.GraphProto, frame: Frame, inputs: Sequence[TensorType | np.ndarray | Appended]
    ) -> tuple[Graph, list[Any], list[Value]]:
        """A subgraph as a graph of its own, its results (the graph's outputs are yet to be set), and the values around it that
        it reads, which are its last inputs. ``inputs`` are the types of the first ones; one that is known is none of them."""
        if len(inputs) != len(graph.input):
            raise self.fail(f"subgraph {graph.name!r} takes {len(graph.input)} inputs and is given {len(inputs)}")
        around = dict(frame.env)
        self._initializers(graph, around, prefix=f"{self.c.b.loc.scope}/" if self.c.b.loc is not None else "")
        inner = Graph("turn")
        env: Env = {}
        for info, x in zip(graph.input, inputs):
            env[info.name] = inner.add_input(info.name, x) if isinstance(x, TensorType) else x
        captured: dict[Value, Value] = {}

        def inside(x: Any) -> Any:
            if isinstance(x, list):
                return [inside(v) for v in x]
            if isinstance(x, Rows):
                return Rows(tuple(map(inside, x.before)), inside(x.made))
            if isinstance(x, Value) and x not in captured:
                captured[x] = inner.add_input(x.name, x.type, unique=True)
            return captured[x] if isinstance(x, Value) else x

        for name in dict.fromkeys(reads(graph)):
            if name in around and name not in env:
                env[name] = inside(around[name])
        outside = self.graph, self.c
        emitter = Emitter(inner, {})
        emitter.b.loc = self.c.b.loc
        self.graph, self.c = inner, emitter
        try:
            loc = emitter.b.loc
            within = Frame(env, frame.opsets, frame.attrs, loc.scope if loc is not None else "", frame.depth + 1)
            self._nodes(graph, within)
            results = [self._lookup(o.name, within, f"the result of subgraph {graph.name!r}") for o in graph.output]
            results = [emitter.value(x) if isinstance(x, Dims) else x for x in results]
        finally:
            self.graph, self.c = outside
        return inner, results, list(captured)


def _plain(x: Any) -> Any:
    if isinstance(x, bytes):
        return x.decode("utf-8", "replace")
    if isinstance(x, (list, tuple)) or type(x).__name__.startswith("Repeated"):
        return [_plain(v) for v in x]
    return x


def _type_proto(x: Any, c: Emitter) -> onnx.TypeProto:
    """The ONNX type of an operand, for function bodies that depend on it."""
    t = onnx.TypeProto()
    if x is None:
        return t
    if isinstance(x, list):
        if x:
            t.sequence_type.elem_type.CopyFrom(_type_proto(x[0], c))
        return t
    shape = [d if isinstance(d, int) else str(d) for d in c.shape(x)]
    return onnx.helper.make_tensor_type_proto(CODE[c.dtype(x)], shape)
