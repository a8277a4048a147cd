"""GGUF files: their metadata describe the model, their tensors stay in the formats that they are stored in."""

from .model import from_gguf

__all__ = ["from_gguf"]
