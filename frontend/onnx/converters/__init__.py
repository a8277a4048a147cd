"""Converters by family. Importing this package registers them all."""

from . import (
    attention,
    control,
    conv,
    experts,
    image,
    index,
    math,
    microsoft,
    nn,
    optional,
    quant,
    quantized,
    recurrent,
    reduce,
    shape,
    signal,
    tables,
    training,
)

__all__ = [
    "attention", "control", "conv", "experts", "image", "index", "math", "microsoft", "nn", "optional", "quant", "quantized",
    "recurrent", "reduce", "shape", "signal", "tables", "training",
]  # fmt: skip
