"""Wasat: a compiler for multimodal transformers."""

__version__ = "0.1.0"
