"""Programs as ONNX models: one table from operation to operators (table.py), what it lacks decomposed."""

from .errors import ExportError
from .export import DEFAULT, NEWEST, OLDEST, to_onnx

__all__ = ["DEFAULT", "NEWEST", "OLDEST", "ExportError", "to_onnx"]
