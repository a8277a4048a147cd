"""Wasat: a compiler for multimodal transformers.

    import wasat as ws
    program = ws.from_pretrained("folder")                        # a Hugging Face folder becomes a typed graph
    ws.compile(program, "model.wasat", quantize="int4")           # passes, TVM, packed weights: one folder
    model = ws.load("model.wasat")                                # needs no compiler
    print(model.generate("def main():", max_tokens=50)[0].text)

Models in     from_pretrained, from_onnx, from_gguf; nn and trace for one's own; parse for a graph's text; load_program
Weights       load_weights: arrays or a folder into a program of one's own
Looking       run (any graph, interpreter or compiled), evaluate (the interpreter), explain (what the passes did),
              compare (two ways to compute a model: the first value that differs)
Programs out  optimize, compile, to_onnx, save_program; train; quantize (weights in fewer bits, calibrated on a text)
Artifacts     load, Model, SamplingOptions
Classes       Program, Graph, Executable, WasatError (the root of all errors)

help(ws.compile) and the like say more; the documents are in docs/.

Names are imported when first used, so that ``wasat.runtime`` alone loads neither the compiler nor NumPy-heavy rooms.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what _HOME says, for type checkers and editors
    from wasat.backends.onnx import to_onnx as to_onnx
    from wasat.calibration import quantize as quantize
    from wasat.comparison import compare as compare
    from wasat.devices import train as train
    from wasat.driver import Executable as Executable
    from wasat.driver import compile as compile
    from wasat.driver import explain as explain
    from wasat.driver import from_gguf as from_gguf
    from wasat.driver import from_pretrained as from_pretrained
    from wasat.driver import load_program as load_program
    from wasat.driver import optimize as optimize
    from wasat.driver import run as run
    from wasat.errors import WasatError as WasatError
    from wasat.frontend import load_weights as load_weights
    from wasat.frontend import nn as nn
    from wasat.frontend.nn import trace as trace
    from wasat.frontend.onnx import from_onnx as from_onnx
    from wasat.ir import Graph as Graph
    from wasat.ir import Program as Program
    from wasat.ir import evaluate as evaluate
    from wasat.ir import parse as parse
    from wasat.runtime import Model as Model
    from wasat.runtime import SamplingOptions as SamplingOptions
    from wasat.runtime import load as load
    from wasat.saved import save_program as save_program

_HOME = {
    "from_pretrained": "wasat.driver", "from_gguf": "wasat.driver", "from_onnx": "wasat.frontend.onnx",
    "trace": "wasat.frontend.nn", "nn": "wasat.frontend", "load_weights": "wasat.frontend", "to_onnx": "wasat.backends.onnx",
    "compile": "wasat.driver", "optimize": "wasat.driver", "run": "wasat.driver", "explain": "wasat.driver",
    "compare": "wasat.comparison", "Executable": "wasat.driver", "load_program": "wasat.driver", "save_program": "wasat.saved",
    "train": "wasat.devices", "quantize": "wasat.calibration",
    "load": "wasat.runtime", "Model": "wasat.runtime", "SamplingOptions": "wasat.runtime",
    "parse": "wasat.ir", "Graph": "wasat.ir", "Program": "wasat.ir", "evaluate": "wasat.ir",
    "WasatError": "wasat.errors",
}  # fmt: skip


if not TYPE_CHECKING:  # else every misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'wasat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
