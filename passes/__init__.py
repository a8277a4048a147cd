"""Graph to graph: clean-up, fusion, quantization, KV-cache derivation, gradients; the manager, remarks."""

from . import default
from .core import Check, GraphPass, Pass, PassError, PassManager, Remark, Remarks, Report, Step
from .default import *  # noqa: F403
from .pattern import Match, Mismatch, Rewrite, Tracer
from .pipelines import pipeline, pipeline_text
from .serving.inference import Inference
from .serving.token_inputs import TokenInputs
from .training.autodiff import Differentiate
from .training.precision import MixedPrecision
from .training.remat import Rematerialize
from .training.round_weights import RoundWeights

__all__ = [
    "Check", "Differentiate", "GraphPass", "Inference", "Match", "Mismatch", "MixedPrecision", "Pass", "PassError",
    "PassManager", "Remark", "Remarks", "Rematerialize", "Report", "Rewrite", "RoundWeights", "Step", "TokenInputs",
    "Tracer", "pipeline", "pipeline_text",
]  # fmt: skip
__all__ += default.__all__
