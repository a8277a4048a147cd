"""One operation as a program: shared by the tests of the ONNX export."""

from __future__ import annotations

from typing import Any

import numpy as np
from wasat.ir import ArrayParam, Builder, Graph, Op, Program, QArray, Sample, type_of


def graph_of(op: Op, sample: Sample) -> tuple[Program, dict[str, Any]]:
    """A graph of one node; quantized operands are parameters, as in a real program."""
    g = Graph("one")
    values, feeds, params = [], {}, {}
    for i, x in enumerate(sample.inputs):
        array = x if isinstance(x, QArray) else np.asarray(x)
        if isinstance(array, QArray):
            values.append(g.add_param(f"w{i}", type_of(array)))
            params[f"w{i}"] = ArrayParam(array, type_of(array))
        else:
            values.append(g.add_input(f"x{i}", type_of(array)))
            feeds[f"x{i}"] = array
    out = Builder(g).emit(op, *values, **sample.attrs)
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return Program({"one": g}, dict(params)), feeds
