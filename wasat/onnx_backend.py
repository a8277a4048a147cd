"""The standard ONNX backend interface over the interpreter (``device="CPU"``), as the ONNX backend suite calls it.

    import wasat.onnx_backend as backend
    (y,) = backend.run_model(model, [x])
    (y,) = backend.prepare(model, target="cpu").run([x])  # compiled
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep, Device, DeviceType

from wasat.frontend.onnx import FromData, from_onnx
from wasat.ir import Program, TensorType, evaluate, type_of


class WasatRep(BackendRep):
    """A model ready to run. It is imported for the inputs at hand: for their types and, where the model makes shapes of their
    numbers (the ``shape`` of a Reshape), for those numbers.
    """

    def __init__(self, model: onnx.ModelProto, target: str | None = None) -> None:
        self.model, self.target = model, target
        initialized = {t.name for t in model.graph.initializer}
        self.inputs = [i for i in model.graph.input if i.name not in initialized]

    def bind(self, inputs: Any) -> tuple[Program, dict[str, Any]]:
        """The program imported for ``inputs``, and what its graph ``forward`` takes: sequences by their elements."""
        given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip((i.name for i in self.inputs), inputs))
        constants: dict[str, np.ndarray] = {}
        while True:
            types = {i.name: _type(given[i.name]) for i in self.inputs if _needs_type(i)}
            try:
                program = from_onnx(self.model, constants=constants, types=types)
                break
            except FromData as e:
                more = {name: given[name] for name in e.inputs if name in given}
                if not more.keys() - constants.keys():
                    raise
                constants.update(more)
        feeds: dict[str, Any] = {}
        for name, x in given.items():
            feeds.update({f"{name}.{i}": v for i, v in enumerate(x)} if isinstance(x, (list, tuple)) else {name: x})
        return program, {v.name: feeds[v.name] for v in program["forward"].inputs}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, in order; ``inputs`` is a sequence in the order of the graph's inputs, or a dict."""
        program, feeds = self.bind(inputs)
        graph = program["forward"]
        if self.target is None:
            params = {name: program.params[name].load() for name in graph.params}
            return grouped(program, evaluate(graph, feeds, params))
        from wasat.backends.tvm.build import Runner
        from wasat.backends.tvm.targets import target_named

        results = Runner(program, target_named(self.target))(graph.name, feeds)
        return grouped(program, [results[name] for name in graph.output_names])


def grouped(program: Program, arrays: Iterable[Any]) -> tuple[Any, ...]:
    """The model's outputs from those of the graph, which has one for each element of a sequence."""
    rest = iter(arrays)
    counts = [count for _, count in program.origin.outputs or ()]
    return tuple(next(rest) if count is None else [next(rest) for _ in range(count)] for count in counts)


def _needs_type(info: onnx.ValueInfoProto) -> bool:
    """Whether the declared type says too little: a sequence, an optional, an unknown rank."""
    return not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape")


def _type(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, (list, tuple)):
        return [_type(v) for v in x]
    t = type_of(np.asarray(x))
    assert isinstance(t, TensorType)
    return t


class WasatBackend(Backend):
    """The interface's class; the functions below are its methods."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        return cls.supports_device(device)

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", target: str | None = None, **kwargs: Any) -> WasatRep:
        """Compiled, at each run, for ``target`` if one is named (``"cpu"``).

        When it is run: OnnxError for a model that cannot be imported, IRError for one that cannot be compiled.
        """
        return WasatRep(model, target)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Sequence[Any], device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Runs one node of the newest operator set."""
        infos = [onnx.helper.make_empty_tensor_value_info(n) for n in node.output if n]
        named = [onnx.helper.make_empty_tensor_value_info(n) for n in node.input if n]
        graph = onnx.helper.make_graph([node], "node", named, infos)
        opsets = [onnx.helper.make_opsetid(node.domain, kwargs.get("opset_version", onnx.defs.onnx_opset_version()))]
        return cls.prepare(onnx.helper.make_model(graph, opset_imports=opsets), device).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return Device(device).type == DeviceType.CPU


is_compatible = WasatBackend.is_compatible
prepare = WasatBackend.prepare
run_model = WasatBackend.run_model
run_node = WasatBackend.run_node
supports_device = WasatBackend.supports_device
