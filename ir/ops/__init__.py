"""The operations, by family. Importing this package registers them all."""

from . import (
    attention,
    bits,
    cond,
    constant,
    conv,
    elementwise,
    grouped,
    index,
    linalg,
    logic,
    nn,
    pool,
    quant,
    random,
    reduce,
    rope,
    scan,
    shape,
    signal,
)

__all__ = [
    "attention", "bits", "cond", "constant", "conv", "elementwise", "grouped", "index", "linalg", "logic", "nn", "pool",
    "quant", "random", "reduce", "rope", "scan", "shape", "signal",
]  # fmt: skip
