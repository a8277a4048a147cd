"""Graph to graph: clean-up, fusion, quantization, KV-cache derivation, gradients; the manager, remarks."""

from .cleanup.algebra import Cleanup
from .cleanup.hoist_params import HoistParams
from .cleanup.read_tables import ReadTables
from .cleanup.simplify_indices import SimplifyIndices
from .core import Check, GraphPass, Pass, PassError, PassManager, Remark, Remarks, Report, Step
from .fusion.fuse_activations import FuseActivations
from .fusion.fuse_attention import FuseAttention
from .fusion.fuse_experts import FuseExperts
from .fusion.fuse_glu import FuseGlu
from .fusion.fuse_norm import FuseNorm
from .fusion.fuse_rope import FuseRope
from .fusion.merge_linears import MergeLinears
from .pattern import Match, Mismatch, Rewrite, Tracer
from .pipelines import default_pipeline, pipeline, pipeline_text
from .serving.inference import Inference
from .serving.kv_cache import DeriveKVCache
from .serving.quantize import KeepQuantized, Quantize
from .serving.token_inputs import TokenInputs
from .training.autodiff import Differentiate
from .training.precision import MixedPrecision
from .training.remat import Rematerialize

__all__ = [
    "Check", "Cleanup", "DeriveKVCache", "Differentiate", "FuseActivations", "FuseAttention", "FuseExperts", "FuseGlu",
    "FuseNorm", "FuseRope", "GraphPass", "HoistParams", "Inference", "KeepQuantized", "Match", "MergeLinears", "Mismatch",
    "MixedPrecision", "Pass", "PassError", "PassManager", "Quantize", "ReadTables", "Remark", "Remarks", "Rematerialize",
    "Report", "Rewrite", "SimplifyIndices", "Step", "TokenInputs", "Tracer", "default_pipeline", "pipeline", "pipeline_text",
]  # fmt: skip
