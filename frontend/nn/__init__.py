"""The DSL: declare modules, write their forward pass in plain math, trace it into a graph.

class Block(nn.Module):
    def __init__(self, dim, heads):
        self.norm, self.attention = nn.RMSNorm(dim), nn.Attention(dim, heads, rope=nn.RoPE(dim // heads))

    def __call__(self, x):
        return x + self.attention(self.norm(x), nn.positions(x))

program = nn.trace(Block(64, 4), {"x": "f32[b, s, 64]"})
"""

from .attention import Attention, CrossAttention, attention
from .audio import frame, log_mel, mel_filters, power_spectrum, reflect
from .einsum import einsum
from .functions import (
    Mask,
    arange,
    causal,
    ceil,
    concat,
    constant,
    cos,
    cumsum,
    dropout,
    erf,
    exp,
    floor,
    full,
    gather,
    gelu,
    heads,
    linear,
    log,
    log_softmax,
    maximum,
    merge,
    minimum,
    one_hot,
    pad,
    positions,
    random_normal,
    random_uniform,
    relu,
    rsqrt,
    sigmoid,
    sign,
    silu,
    sin,
    softmax,
    softplus,
    sqrt,
    stack,
    stop_gradient,
    take_along,
    tanh,
    top_k,
    where,
    within,
)
from .image import patches, resize, sample_frames
from .layers import (
    ACTIVATIONS,
    GLU,
    MLP,
    Conv1d,
    Conv2d,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    activation,
    conv,
    layer_norm,
    rms_norm,
)
from .loops import scan
from .module import Module, ModuleList, Parameter, RandomParam
from .rope import SCALINGS, RoPE, RoPE2D, frequencies, rope, sinusoid
from .tensor import Tensor, emit
from .tracing import is_training, trace

__all__ = [
    "ACTIVATIONS", "GLU", "MLP", "SCALINGS", "Attention", "Conv1d", "Conv2d", "CrossAttention", "Dropout", "Embedding",
    "LayerNorm", "Linear", "Mask", "Module", "ModuleList", "Parameter", "RMSNorm", "RandomParam", "RoPE", "RoPE2D",
    "Tensor", "activation", "arange", "attention", "causal", "ceil", "concat", "constant", "conv", "cos", "cumsum",
    "dropout", "einsum", "emit", "erf", "exp", "floor", "frame", "frequencies", "full", "gather", "gelu", "heads",
    "is_training", "layer_norm", "linear", "log", "log_mel", "log_softmax", "maximum", "mel_filters", "merge",
    "minimum", "one_hot", "pad", "patches", "positions", "power_spectrum", "random_normal", "random_uniform", "reflect",
    "relu", "resize", "rms_norm", "rope", "rsqrt", "sample_frames", "scan", "sigmoid", "sign", "silu", "sin", "sinusoid",
    "softmax", "softplus", "sqrt", "stack", "stop_gradient", "take_along", "tanh", "top_k", "trace", "where", "within",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
