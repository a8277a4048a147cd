"""The operations, by family. Importing this package registers them all."""

from . import attention, constant, conv, elementwise, index, linalg, logic, nn, quant, random, reduce, shape

__all__ = [
    "attention", "constant", "conv", "elementwise", "index", "linalg", "logic", "nn", "quant", "random", "reduce", "shape",
]  # fmt: skip
