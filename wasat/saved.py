"""A program in one file: its text and its parameters, in the safetensors format.

The file's metadata hold the text (graphs and interface), where the program came from, and the type of every parameter. A dense
parameter is a tensor of its name; element types that the format lacks are kept as bytes. A quantized one is ``NAME#values`` and
``NAME#scales``, or ``NAME#blocks`` in a format of blocks. Parameters are written one at a time, and mapped when read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from wasat.frontend.weights.safetensors import TENSOR_TYPES, Stored, read_header, read_metadata
from wasat.ir import (
    Array,
    CheckpointError,
    DType,
    IRError,
    Program,
    QArray,
    QTensorType,
    TensorType,
    Type,
    parse_program,
    parse_type,
)
from wasat.ir.interface import Origin
from wasat.ir.types import BlockArray

_KEY, _FORMAT = "wasat.program", 1
_NAMES = {dtype: name for name, dtype in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class _Saved:
    """A parameter in the file of a program."""

    type: Type
    parts: Mapping[str, Stored]

    is_data: ClassVar[bool] = True

    def load(self) -> Array:
        found = {part: stored.load() for part, stored in self.parts.items()}
        if isinstance(self.type, TensorType):
            return found[""] if found[""].dtype == self.type.dtype.np else found[""].view(self.type.dtype.np)
        if self.type.stored is not None:
            return BlockArray(self.type, found["blocks"])
        return QArray(self.type, found["values"], found["scales"], found.get("zeros"))


def save_program(program: Program, path: str | Path) -> None:
    """Writes ``program`` into the file ``path``, for :func:`wasat.load_program`; a file that is there is replaced at the end.

    Files that belong to it (a tokenizer) are kept inside. Raises WasatError for a parameter without numbers.
    """
    program.verify()
    path = Path(path)
    parts = {name: _parts(source.type) for name, source in program.params.items()}
    tensors = {_tensor(name, part): (name, part, *spec) for name, found in parts.items() for part, spec in found.items()}
    if len(tensors) < sum(map(len, parts.values())):
        raise IRError("two parameters would be one tensor in the file; a name like 'x#scales' belongs to the quantized x")
    about = {
        "format": _FORMAT, "text": str(program), "origin": _origin(program.origin),
        "parameters": {name: str(source.type) for name, source in program.params.items()},
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(about)}}
    end = 0
    order = sorted(tensors, key=lambda k: (-tensors[k][2].np.itemsize, list(program.params).index(tensors[k][0])))  # aligned
    for k in order:
        _, _, dtype, shape = tensors[k]
        size = math.prod(shape) * dtype.np.itemsize
        header[k] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(fresh, "xb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for k in order:
                name, part, dtype, _ = tensors[k]
                f.write(np.ascontiguousarray(_part(program.load(name), part)).view(np.uint8).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def is_saved(path: Path) -> bool:
    """Whether a file is in the format of safetensors, by its first bytes."""
    with path.open("rb") as f:
        start = f.read(9)
    return len(start) == 9 and start[8:] == b"{"


def load_saved(path: Path) -> Program:
    """The program that :func:`save_program` wrote. Parameters stay in the file, which must not change meanwhile.

    Raises CheckpointError for a file that is damaged or holds something else, ParseError for a text that cannot be read.
    """
    text = read_metadata(path).get(_KEY)
    if text is None:
        raise CheckpointError(f"{path} holds tensors and no program: give the folder of the model, or load_weights the file")
    stored = read_header(path)
    try:
        about = json.loads(text)
        if about["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {about['format']} and this is format {_FORMAT}: save the program again")
        source, types = str(about["text"]), {str(name): parse_type(str(t)) for name, t in about["parameters"].items()}
        origin = _read_origin(about["origin"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}") from None
    program = parse_program(source, str(path))
    program.origin = origin
    for name, t in types.items():
        found = {}
        for part, (dtype, shape) in _parts(t).items():
            tensor = stored.get(_tensor(name, part))
            if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
                raise CheckpointError(f"{path} is damaged: parameter {name} is {t}, of which {part or 'the tensor'} differs")
            found[part] = tensor
        program.params[name] = _Saved(t, found)
    program.verify()
    return program


def _tensor(name: str, part: str) -> str:
    return f"{name}#{part}" if part else name


def _parts(type: Type) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Element type and shape of the tensors that hold a parameter."""
    shape = tuple(_size(d) for d in type.shape)
    if isinstance(type, QTensorType):
        if type.stored is not None:
            return {"blocks": (DType.U8, (*shape[:-1], shape[-1] // type.stored.block, type.stored.size))}
        blocks = (*shape[:-1], _size(type.blocks))
        zeros = {"zeros": (DType.I8, blocks)} if type.zeros else {}
        return {"values": (DType.I8, shape), "scales": (type.scale, blocks), **zeros}
    return {"": (type.dtype, shape) if type.dtype in _NAMES else (DType.U8, shape)}


def _size(d: object) -> int:
    if not isinstance(d, int):
        raise IRError(f"a parameter's size is {d}: parameters have known sizes")
    return d


def _part(x: Array, part: str) -> np.ndarray:
    if isinstance(x, BlockArray):
        return x.data
    if isinstance(x, QArray):
        found = {"scales": x.scales, "values": x.values.astype(np.int8, copy=False), "zeros": x.zeros}[part]
        assert found is not None
        return found
    return np.asarray(x)


def _origin(origin: Origin) -> dict[str, Any]:
    """As JSON; of the tokenizer the text, so that the file is whole."""
    texts = dict(origin.texts)
    if origin.tokenizer is not None:
        texts["tokenizer.json"] = Path(origin.tokenizer).read_text(encoding="utf-8")
    return {**{f.name: getattr(origin, f.name) for f in dataclasses.fields(origin)}, "tokenizer": None, "texts": texts}


def _read_origin(data: Mapping[str, Any]) -> Origin:
    outputs = data["outputs"] if data["outputs"] is None else tuple((str(name), n) for name, n in data["outputs"])
    texts = {str(name): str(text) for name, text in data["texts"].items()}
    return Origin(str(data["family"]), None, outputs, dict(data["dequantized"]), texts, data.get("rounded"))
