"""The operations, by family. Importing this package registers them all."""

from . import constant, elementwise

__all__ = ["constant", "elementwise"]
