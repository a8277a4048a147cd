"""What the tests of the ONNX import share: models from text, and running them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser
from wasat.ir import Program, evaluate


def model(text: str) -> onnx.ModelProto:
    """A model from ONNX's own text, of operator set 23."""
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 10, opset_import: ["": 23]>\n{text}'
    return parser.parse_model(text)


def run(program: Program, *inputs: Any) -> list[Any]:
    g = program["forward"]
    program.verify()
    params = {name: program.params[name].load() for name in g.params}
    return evaluate(g, dict(zip((v.name for v in g.inputs), inputs)), params)


def tensor(name: str, x: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(x), name)


def add_initializers(m: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    m.graph.initializer.extend(tensor(k, v) for k, v in arrays.items())
    return m
