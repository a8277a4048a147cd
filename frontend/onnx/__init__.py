"""ONNX models as programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from wasat.ir import Program

from . import converters
from .errors import FromData, OnnxError
from .files import read
from .importer import Importer


def from_onnx(
    source: str | Path | bytes | onnx.ModelProto, *, constants: Mapping[str, np.ndarray] | None = None,
    types: Mapping[str, Any] | None = None, sizes: Mapping[str, int] | None = None,
) -> Program:  # fmt: skip
    """The program of an ONNX model: one graph ``forward`` with the model's inputs, outputs, names and symbolic sizes.

    Initializers become parameters under their names, read when asked for; external data are memory-mapped. Functions are
    inlined, ``If``, ``Loop`` and ``Scan`` folded, unrolled or become ``scan``. ``constants`` fixes inputs to numbers; one
    number fills the input's declared shape (an attention mask of ones). Of a merged decoder (``use_cache_branch``) it is the
    branch without a past, unless ``constants`` says otherwise. ``types`` gives inputs another type than declared: a
    TensorType, a list of them for a sequence, None for an empty optional. ``sizes`` fixes symbolic sizes of inputs, by
    the names that the file or the program has for them: what depends on them is decided while importing.

    ``origin.outputs`` lists ``(name, count)``: count is None for a tensor, else how many tensors a sequence has.

    Raises OnnxError for a damaged file and for what is not supported (all at once), FromData where a shape depends
    on the numbers in an input.
    """
    return Importer(read(source), constants or {}, types or {}, sizes or {}).run()


__all__ = ["FromData", "OnnxError", "converters", "from_onnx"]
