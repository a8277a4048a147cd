"""The DSL: declare modules, write their forward pass in plain math, trace it into a graph.

class Block(nn.Module):
    def __init__(self, dim, heads):
        self.norm, self.attention = nn.RMSNorm(dim), nn.Attention(dim, heads, rope=nn.RoPE(dim // heads))

    def __call__(self, x):
        return x + self.attention(self.norm(x), nn.positions(x))

program = nn.trace(Block(64, 4), {"x": "f32[b, s, 64]"})
"""

from . import init
from .arrays import (
    argmax,
    argmin,
    argsort,
    clip,
    cosine_similarity,
    cummax,
    cummin,
    cumprod,
    eye,
    flatten,
    flip,
    full_like,
    linspace,
    logaddexp,
    logcumsumexp,
    logsumexp,
    masked_fill,
    normalize,
    ones,
    ones_like,
    outer,
    repeat,
    roll,
    sort,
    squeeze,
    std,
    tile,
    tril,
    triu,
    unsqueeze,
    var,
    zeros,
    zeros_like,
)
from .attention import Attention, CrossAttention, attention, linear_attention
from .audio import frame, log_mel, mel_filters, power_spectrum, reflect
from .blocks import (
    ELU,
    GELU,
    GRU,
    LSTM,
    BatchNorm,
    Flatten,
    GroupNorm,
    Identity,
    LeakyReLU,
    Mish,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
    batch_norm,
    elu,
    embedding,
    group_norm,
    leaky_relu,
    mish,
)
from .einsum import einsum
from .experts import MoE, grouped_linear
from .functions import (
    Mask,
    abs,
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
from .losses import (
    bce_with_logits,
    cross_entropy,
    huber,
    kl_div,
    l1,
    mse,
)
from .module import Module, ModuleList, Parameter, RandomParam
from .rope import SCALINGS, RoPE, RoPE2D, frequencies, rope, sinusoid
from .spatial import (
    AdaptiveAvgPool2d,
    AvgPool1d,
    AvgPool2d,
    ConvTranspose1d,
    ConvTranspose2d,
    MaxPool1d,
    MaxPool2d,
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    conv_transpose1d,
    conv_transpose2d,
    interpolate,
    max_pool1d,
    max_pool2d,
)
from .tensor import Tensor, emit
from .tracing import add_loss, is_training, trace

__all__ = [
    "ACTIVATIONS", "ELU", "GELU", "GLU", "GRU", "LSTM", "MLP", "SCALINGS", "AdaptiveAvgPool2d", "Attention", "AvgPool1d",
    "AvgPool2d", "BatchNorm", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "CrossAttention", "Dropout",
    "Embedding", "Flatten", "GroupNorm", "Identity", "LayerNorm", "LeakyReLU", "Linear", "Mask", "MaxPool1d", "MaxPool2d",
    "Mish", "MoE", "Module", "ModuleList", "Parameter", "RMSNorm", "RandomParam", "ReLU", "RoPE", "RoPE2D", "Sequential",
    "SiLU", "Sigmoid", "Tanh", "Tensor", "abs", "activation", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "add_loss", "arange", "argmax", "argmin", "argsort", "attention",
    "avg_pool1d", "avg_pool2d", "batch_norm", "bce_with_logits", "causal", "ceil", "clip", "concat", "constant", "conv",
    "conv_transpose1d", "conv_transpose2d", "cos", "cosine_similarity", "cross_entropy", "cummax", "cummin", "cumprod",
    "cumsum", "dropout", "einsum", "elu", "embedding", "emit", "erf", "exp", "eye", "flatten", "flip", "floor", "frame",
    "frequencies", "full", "full_like", "gather", "gelu", "group_norm", "grouped_linear", "heads", "huber", "init",
    "interpolate", "is_training", "kl_div", "l1", "layer_norm", "leaky_relu", "linear", "linear_attention", "linspace", "log",
    "log_mel", "log_softmax", "logaddexp", "logcumsumexp", "logsumexp", "masked_fill", "max_pool1d", "max_pool2d", "maximum",
    "mel_filters", "merge", "minimum", "mish", "mse", "normalize", "one_hot", "ones", "ones_like", "outer", "pad", "patches",
    "positions", "power_spectrum", "random_normal", "random_uniform", "reflect", "relu", "repeat", "resize", "rms_norm",
    "roll", "rope", "rsqrt", "sample_frames", "scan", "sigmoid", "sign", "silu", "sin", "sinusoid", "softmax", "softplus",
    "sort", "sqrt", "squeeze", "stack", "std", "stop_gradient", "take_along", "tanh", "tile", "top_k", "trace", "tril", "triu",
    "unsqueeze", "var", "where", "within", "zeros", "zeros_like",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
