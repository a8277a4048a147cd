"""What the IR raises. Every message says what is wrong, where, and where possible what to do."""

from __future__ import annotations

import linecache
from dataclasses import dataclass

from wasat.errors import WasatError as WasatError


@dataclass(frozen=True)
class Loc:
    """Where a node was written: a source line, or a named place in a file (an ONNX node).

    ``scope`` is the path of the module that was being traced (``layers.3.attention``), ``caller`` the line that called into
    ``file``, up to the user's own outermost line.
    """

    file: str
    line: int | None = None
    function: str = ""
    scope: str = ""
    caller: Loc | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return place + (f" in {self.function}" if self.function else "") + (f" ({self.scope})" if self.scope else "")

    @property
    def source(self) -> str:
        """The text of the line, if the file can be read; else empty."""
        return linecache.getline(self.file, self.line).strip() if self.line else ""


class CheckpointError(WasatError):
    """Files of weights, of a saved program or of a training run: missing, damaged, of another model or run, not written."""


class DimError(WasatError):
    """A dimension that cannot be: a division by zero, sizes that contradict each other."""


class IRError(WasatError):
    """A graph, node or type that cannot be."""

    def __init__(self, message: str, loc: Loc | None = None) -> None:
        self.message, self.loc = message, loc
        lines = [message]
        at = loc
        while at is not None:
            lines.append(f"  at {at}" + (f"\n      {at.source}" if at.source else ""))
            at = at.caller
        super().__init__("\n".join(lines))

    def reworded(self, message: str) -> IRError:
        """The same error with another message; a class of somebody else's may be made of other arguments than these."""
        made = IRError.__new__(type(self))
        IRError.__init__(made, message, self.loc)
        return made


def message_of(e: BaseException) -> str:
    """What an exception says, which may be anybody's: writing it may raise."""
    try:
        return str(e)
    except Exception:
        return "its message cannot be written"


def said(e: BaseException) -> str:
    """The class of an exception, and what it says."""
    return f"{type(e).__name__}: {message_of(e)}"


class TypeMismatch(IRError):
    """Shapes, dtypes or attributes that an operation refuses."""


class ParseError(IRError):
    """Text that is not a graph; the message shows file, line and caret."""


class VerifyError(IRError):
    """A graph whose nodes, types or uses are inconsistent."""


class NotDifferentiable(IRError):
    """An operation without a gradient where one was asked for."""
