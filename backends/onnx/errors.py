"""What the ONNX export raises."""

from __future__ import annotations

from wasat.ir import WasatError


class ExportError(WasatError):
    """A program, a file or an option that cannot be exported; for operations, all of them at once."""


class Unsupported(Exception):
    """Raised by an emission: this node has no form in the operator set at hand. Collected into one ExportError."""


__all__ = ["ExportError", "Unsupported"]
