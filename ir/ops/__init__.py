"""The operations, by family. Importing this package registers them all."""

from . import constant, elementwise, index, reduce, shape

__all__ = ["constant", "elementwise", "index", "reduce", "shape"]
