"""What the importer raises."""

from __future__ import annotations

from wasat.ir import WasatError


class OnnxError(WasatError):
    """An ONNX file that is damaged, or that asks for something that cannot be imported."""


class FromData(OnnxError):
    """A shape (or a decision) that depends on the numbers in an input: the IR's shapes are symbols and constants.

    ``inputs`` names the graph inputs it depends on; given as constants, they make the import possible.
    """

    def __init__(self, message: str, inputs: tuple[str, ...]) -> None:
        super().__init__(message)
        self.inputs = inputs
