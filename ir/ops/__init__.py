"""The operations, by family. Importing this package registers them all."""

from . import attention, constant, elementwise, index, linalg, nn, quant, reduce, shape

__all__ = ["attention", "constant", "elementwise", "index", "linalg", "nn", "quant", "reduce", "shape"]
