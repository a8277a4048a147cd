"""What the runtime raises. Every message says what is wrong and what to do about it."""

from __future__ import annotations

from wasat.errors import WasatError

AGAIN = "compile the model again"


class RuntimeErrorBase(WasatError):
    """Base of every error that the runtime raises on purpose."""


class ArtifactError(RuntimeErrorBase):
    """An artifact that is damaged, incomplete or made for another machine, or a place where none can be written."""


class InputError(RuntimeErrorBase, ValueError):
    """A prompt, option or array that the model cannot take."""


class ContextLimitError(InputError):
    """More positions than the model, or the session, has room for. Nothing was written."""


class MediaError(InputError):
    """A picture, sound or video that cannot be read, or is absurd. It names the file."""


class ModelError(RuntimeErrorBase):
    """The model itself misbehaved: it returned numbers that are no numbers."""
