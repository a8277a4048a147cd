"""The operations, by family. Importing this package registers them all."""

from . import (
    attention,
    bits,
    cache,
    cond,
    constant,
    conv,
    elementwise,
    grouped,
    index,
    linalg,
    linear_attention,
    logic,
    nn,
    pool,
    quant,
    random,
    reduce,
    rope,
    rounding,
    scan,
    shape,
    signal,
    unary,
)

__all__ = [
    "attention", "bits", "cache", "cond", "constant", "conv", "elementwise", "grouped", "index", "linalg",
    "linear_attention", "logic", "nn", "pool", "quant", "random", "reduce", "rope", "rounding", "scan", "shape", "signal",
    "unary",
]  # fmt: skip
