"""The command line: ``wasat``."""

from .app import main

__all__ = ["main"]
