"""The root of all errors: what every room may import, and nothing else."""

from __future__ import annotations


class WasatError(Exception):
    """Base of every error that Wasat raises on purpose, while it compiles and while a model runs."""
