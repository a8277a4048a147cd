"""From TensorIR to code for CPUs: the passes that our kernels and tensor expressions need.

TVM's default pipeline is made for every target: half of its passes are about GPUs, and several simplify again what LLVM
simplifies anyway. On kernels that are unrolled into registers these take two thirds of the whole compilation.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

NAME = "wasat_cpu"


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
