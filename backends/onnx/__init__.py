"""Programs as ONNX models: one table from operation to operators (table.py), what it lacks decomposed."""

from .errors import ExportError
from .export import DEFAULT, NEWEST, OLDEST, to_onnx

FORMATS = (("*", "int?b*"),)
"""Types of quantized weights that ONNX has room for: integers of 4 and 8 bits, with scales. In others, a value takes a byte."""

__all__ = ["DEFAULT", "FORMATS", "NEWEST", "OLDEST", "ExportError", "to_onnx"]
