"""From TensorIR to code for CPUs: the passes that our kernels and tensor expressions need.

TVM's default pipeline is made for every target: half of its passes are about GPUs, and several simplify again what LLVM
simplifies anyway. On kernels that are unrolled into registers these take two thirds of the whole compilation.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

NAME = "wasat_cpu"
_SMALL = 2**14
_MOST = 2**17
"""Bytes of a buffer, and of all of a function, that go on the stack. Threads of TVM's have 8 MB."""


@tirx.transform.prim_func_pass(opt_level=0, name="ScratchOnStack")
class ScratchOnStack:
    """Small buffers of known size go on the stack.

    TVM takes what is larger than 1 KB from a pool, at every call: in decode of a small model a tenth of all instructions.
    """

    def transform_function(self, func: Any, module: Any, context: Any) -> Any:
        left = _MOST

        def visit(s: Any) -> Any:
            nonlocal left
            if isinstance(s, tirx.AllocBuffer):
                size = _bytes(s.buffer)
                if size is None or not 1 <= size <= min(_SMALL, left):
                    return s
                left -= size
                return tirx.AllocBuffer(s.buffer, {**s.annotations, "disable_lower_builtin": tirx.IntImm("bool", 1)})
            if isinstance(s, tirx.SeqStmt):
                new = [visit(x) for x in s.seq]
                return s if all(a is b for a, b in zip(new, s.seq)) else tirx.SeqStmt(new)
            if isinstance(s, tirx.IfThenElse):
                return tirx.IfThenElse(s.condition, visit(s.then_case), s.else_case and visit(s.else_case))
            if isinstance(s, tirx.For):
                return tirx.For(
                    s.loop_var, s.min, s.extent, s.kind, visit(s.body), s.thread_binding, s.annotations, s.step
                )  # fmt: skip
            if isinstance(s, tirx.AttrStmt):
                return tirx.AttrStmt(s.node, s.attr_key, s.value, visit(s.body))
            if isinstance(s, tirx.While):
                return tirx.While(s.condition, visit(s.body))
            return s

        return func.with_body(visit(func.body))


def _bytes(buffer: Any) -> int | None:
    """None: known at run time alone."""
    sizes = [s.value for s in buffer.shape if isinstance(s, tirx.IntImm)]
    return math.prod(sizes) * tvm.DataType(buffer.dtype).itemsize if len(sizes) == len(buffer.shape) else None


def lowering() -> Any:
    """From kernels and tensor expressions to code of the host and the device."""
    return tvm.transform.Sequential([
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        ScratchOnStack(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ])  # fmt: skip


def register() -> str:
    """Makes the pipeline known to TVM; returns its name, which tvm.compile takes."""
    compilation_pipeline.register_tir_pipeline(
        NAME, lambda: (lowering(), compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes)
    )
    return NAME
