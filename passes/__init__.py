"""Graph to graph: clean-up, fusion, quantization, KV-cache derivation, gradients; the manager, remarks."""

from .autodiff import Differentiate
from .cleanup import Cleanup
from .core import Check, GraphPass, Pass, PassError, PassManager, Remark, Remarks, Report, Step
from .fuse_activations import FuseActivations
from .fuse_attention import FuseAttention
from .fuse_glu import FuseGlu
from .fuse_norm import FuseNorm
from .fuse_rope import FuseRope
from .hoist_params import HoistParams
from .inference import Inference
from .kv_cache import DeriveKVCache
from .merge_linears import MergeLinears
from .pattern import Match, Mismatch, Rewrite, Tracer
from .pipelines import default_pipeline
from .precision import MixedPrecision
from .quantize import Quantize
from .remat import Rematerialize
from .simplify_indices import SimplifyIndices
from .tables import ReadTables
from .token_inputs import TokenInputs

__all__ = [
    "Check", "Cleanup", "DeriveKVCache", "Differentiate", "FuseActivations", "FuseAttention", "FuseGlu", "FuseNorm",
    "FuseRope", "GraphPass", "HoistParams", "Inference", "Match", "MergeLinears", "Mismatch", "MixedPrecision", "Pass",
    "PassError", "PassManager", "Quantize", "ReadTables", "Remark", "Remarks", "Rematerialize", "Report", "Rewrite",
    "SimplifyIndices", "Step", "TokenInputs", "Tracer", "default_pipeline",
]  # fmt: skip
