"""The DSL: declare modules, write their forward pass in plain math, trace it into a graph.

class Block(nn.Module):
    def __init__(self, dim, heads):
        self.norm, self.attention = nn.RMSNorm(dim), nn.Attention(dim, heads, rope=nn.RoPE(dim // heads))

    def __call__(self, x):
        return x + self.attention(self.norm(x), nn.positions(x))

program = nn.trace(Block(64, 4), {"x": "f32[b, s, 64]"})
"""

from . import functions, init
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
    celu,
    elu,
    embedding,
    glu,
    group_norm,
    hardsigmoid,
    hardswish,
    hardtanh,
    instance_norm,
    leaky_relu,
    logsigmoid,
    mish,
    prelu,
    relu6,
    selu,
    softsign,
)
from .einsum import einsum
from .experts import MoE, grouped_linear
from .functions import *  # noqa: F403
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
    smooth_l1,
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
    pixel_shuffle,
    pixel_unshuffle,
)
from .tensor import Tensor, emit
from .tracing import add_loss, is_training, trace

__all__ = [
    "ACTIVATIONS", "ELU", "GELU", "GLU", "GRU", "LSTM", "MLP", "SCALINGS", "AdaptiveAvgPool2d", "Attention", "AvgPool1d",
    "AvgPool2d", "BatchNorm", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "CrossAttention", "Dropout",
    "Embedding", "Flatten", "GroupNorm", "Identity", "LayerNorm", "LeakyReLU", "Linear", "MaxPool1d", "MaxPool2d", "Mish",
    "MoE", "Module", "ModuleList", "Parameter", "RMSNorm", "RandomParam", "ReLU", "RoPE", "RoPE2D", "Sequential", "SiLU",
    "Sigmoid", "Tanh", "Tensor", "activation", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "add_loss", "argmax", "argmin", "argsort", "attention", "avg_pool1d", "avg_pool2d",
    "batch_norm", "bce_with_logits", "celu", "clip", "conv", "conv_transpose1d", "conv_transpose2d", "cosine_similarity",
    "cross_entropy", "cummax", "cummin", "cumprod", "einsum", "elu", "embedding", "emit", "eye", "flatten", "flip",
    "frame", "frequencies", "full_like", "glu", "group_norm", "grouped_linear", "hardsigmoid", "hardswish", "hardtanh",
    "huber", "init", "instance_norm", "interpolate", "is_training", "kl_div", "l1", "layer_norm", "leaky_relu",
    "linear_attention", "linspace", "log_mel", "logaddexp", "logcumsumexp", "logsigmoid", "logsumexp", "masked_fill",
    "max_pool1d", "max_pool2d", "mel_filters", "mish", "mse", "normalize", "ones", "ones_like", "outer", "patches",
    "pixel_shuffle", "pixel_unshuffle", "power_spectrum", "prelu", "reflect", "relu6", "repeat", "resize", "rms_norm",
    "roll", "rope", "sample_frames", "scan", "selu", "sinusoid", "smooth_l1", "softsign", "sort", "squeeze", "std", "tile",
    "trace", "tril", "triu", "unsqueeze", "var", "zeros", "zeros_like",
]  # fmt: skip
__all__ += functions.__all__


def __dir__() -> list[str]:
    return sorted(__all__)
