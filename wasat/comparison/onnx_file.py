"""onnxruntime on an ONNX file as it is: each of its nodes, fed what our graph of the file has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wasat.driver import Progress, quiet
from wasat.ir import Array, Value, WasatError

from .bounds import bounds_of, once
from .engines import OnnxRuntime
from .found import Stage, difference
from .fragments import fragment, slice_to
from .nodes import CLOSEST, Run


def compare_file(run: Run, path: Path, tell: Progress = quiet) -> tuple[Stage, dict[str, Array]]:
    """Each node of the file whose results ours has by name, computed by onnxruntime from our values (where an operand has no
    counterpart, together with the nodes that make it); and the outputs of the whole file. Raises WasatError where onnxruntime
    refuses the file."""
    import onnx

    runtime = OnnxRuntime()
    model = onnx.load(str(path))
    stage = Stage(f"{path.name}, node by node: interpreter, onnxruntime")
    ours = {v.name: v for v in run.values if isinstance(run.values[v], np.ndarray)}
    weights = {t.name: t for t in model.graph.initializer}
    makers = {name: n for n in model.graph.node for name in n.output if name}
    there = {n: v for n, v in ours.items() if n not in weights and (v.node is not None or n not in makers)}
    order = {id(n): i for i, n in enumerate(model.graph.node)}
    found = []
    for i, node in enumerate(model.graph.node):
        tell("comparing nodes", i, len(order))
        known = [n for n in node.output if n in there]
        if not known or node.op_type == "Constant":
            continue
        together, operands = [node], dict[str, None]()
        for n in together:  # grows
            for name in filter(None, n.input):
                if name in there:
                    operands[name] = None
                elif name in makers and makers[name] not in together:
                    together.append(makers[name])
        together.sort(key=lambda n: order[id(n)])
        try:
            given = {n: np.asarray(run.values[there[n]]) for n in operands}
            results = _alone(model, together, known, given, weights, runtime)
        except Exception as e:  # a node with graphs within, or whatever onnxruntime does not run
            stage.skipped.append(f"{node.name or known[0]} = {node.op_type}: {str(e).strip().splitlines()[0]}")
            continue
        for name in known:
            v, x, y = there[name], np.asarray(run.values[there[name]]), results[name]
            if x.shape != y.shape or x.dtype != y.dtype:
                sizes = f"ours is {x.dtype}{list(x.shape)}, theirs {y.dtype}{list(y.shape)}"
                stage.skipped.append(f"{name} = {node.op_type}: {sizes}")
                continue
            d = difference(v, name, x, y, once(x, v))
            found.append(difference(v, name, x, y, _bound(run, v, {there[n] for n in operands})) if d.differs else d)
    stage.values = len(found)
    stage.differences = [d for d in found if d.differs]
    stage.closest = sorted((d for d in found if not d.differs), key=lambda d: -d.ratio)[:CLOSEST]
    return stage, _whole(path, runtime, {v.name: run.values[v] for v in run.graph.inputs})


def _bound(run: Run, v: Value, cut: set[Value]) -> Any:
    """Of all our nodes that the node of the file became."""
    nodes = slice_to([v], cut)
    part, read = fragment("part", nodes, [v], run.sizes)
    return bounds_of(part, run.given(read), run.params, run.sizes)[0]


def _whole(path: Path, runtime: OnnxRuntime, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The file's outputs, by onnxruntime."""
    try:
        session = runtime.session(path)
        results = session.run(None, {i.name: np.asarray(inputs[i.name]) for i in session.get_inputs()})
    except Exception as e:
        raise WasatError(f"onnxruntime refuses {path}: {str(e).strip().splitlines()[0]}") from None
    found: dict[str, Array] = {}
    for o, x in zip(session.get_outputs(), results):  # of a sequence, each element; absent ones are none
        found |= {f"{o.name}.{i}": np.asarray(y) for i, y in enumerate(x)} if isinstance(x, list) else {}
        found |= {o.name: np.asarray(x)} if isinstance(x, np.ndarray) else {}
    return found


def _alone(
    model: Any, nodes: Sequence[Any], names: Sequence[str], given: Mapping[str, np.ndarray], weights: Mapping[str, Any],
    runtime: OnnxRuntime,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Results of some of the file's nodes, by name."""
    import onnx
    from onnx import helper

    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()]
    read = dict.fromkeys(x for n in nodes for x in n.input)
    graph = helper.make_graph(
        nodes, "part", inputs, [onnx.ValueInfoProto(name=n) for n in names], [weights[n] for n in read if n in weights]
    )
    part = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    part.ir_version = model.ir_version
    return dict(zip(names, runtime.session(part.SerializeToString()).run(None, dict(given))))
