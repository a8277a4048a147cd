"""Compiles graphs with TVM."""

import sys

import tvm_ffi
from wasat.ir.errors import WasatError

if "tvm" not in sys.modules and tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True) is not None:
    raise WasatError(  # two runtimes in one process end it: both register the same global names
        "this process already runs the TVM runtime of an artifact, beside which the compiler cannot be loaded: "
        "compile in a process of its own, or import tvm before loading the artifact"
    )
