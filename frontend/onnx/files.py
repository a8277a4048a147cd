"""Reading ONNX files: protobuf, initializers, external data. Sizes are checked before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from wasat.frontend.weights.safetensors import FileParam, Stored
from wasat.ir import DType, ParamSource, TensorType

from .errors import OnnxError

_T = onnx.TensorProto
ELEMENT = {
    _T.FLOAT: DType.F32, _T.UINT8: DType.U8, _T.INT8: DType.I8, _T.UINT16: DType.U16, _T.INT16: DType.I16,
    _T.INT32: DType.I32, _T.INT64: DType.I64, _T.BOOL: DType.BOOL, _T.FLOAT16: DType.F16, _T.DOUBLE: DType.F64,
    _T.UINT32: DType.U32, _T.UINT64: DType.U64, _T.BFLOAT16: DType.BF16, _T.FLOAT8E4M3FN: DType.F8E4M3,
    _T.FLOAT8E5M2: DType.F8E5M2, _T.FLOAT8E4M3FNUZ: DType.F8E4M3FNUZ, _T.FLOAT8E5M2FNUZ: DType.F8E5M2FNUZ,
    _T.FLOAT8E8M0: DType.F8E8M0, _T.FLOAT4E2M1: DType.F4E2M1, _T.UINT4: DType.U4, _T.INT4: DType.I4, _T.UINT2: DType.U2,
    _T.INT2: DType.I2,
}  # fmt: skip
"""ONNX element types that the IR has."""
CODE = {d: code for code, d in ELEMENT.items()}


def element(code: Any, what: str) -> DType:
    """The element type with ONNX's number ``code``."""
    if code not in ELEMENT:
        name = _T.DataType.Name(code) if code in _T.DataType.values() else str(code)
        raise OnnxError(f"{what} has element type {name}, which is not supported")
    return ELEMENT[code]


@dataclass(frozen=True)
class Source:
    """A model, and where it came from: the folder that its external data may lie in (None: it cannot have any)."""

    model: onnx.ModelProto
    name: str
    folder: Path | None


def read(source: str | Path | bytes | onnx.ModelProto) -> Source:
    """Parses a model from a file, its bytes, or takes it as it is. External data are not read."""
    if isinstance(source, onnx.ModelProto):
        return Source(source, "model", None)
    if isinstance(source, bytes):
        data, path = source, None
    else:
        path = Path(source)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise OnnxError(f"{path} cannot be read: {e}") from None
        except ValueError as e:  # no file can be called so
            raise OnnxError(f"{str(path)!a} cannot be read: {e}") from None
    name = str(path) if path is not None else "model"
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as e:
        raise OnnxError(f"{name} is no ONNX file, or is damaged or truncated: {e}") from None
    return Source(model, name, path.parent if path is not None else None)


def parameter(t: onnx.TensorProto, source: Source) -> ParamSource:
    """An initializer as a parameter: external data memory-mapped, the rest decoded when it is loaded."""
    type = _type(t)
    if t.data_location == _T.EXTERNAL:
        return _external(t, type, source)
    _check_size(t, type)
    return _ProtoParam(type, t)


def array(t: onnx.TensorProto, source: Source) -> np.ndarray:
    """The numbers of a tensor."""
    return np.asarray(parameter(t, source).load())


@dataclass(frozen=True)
class _ProtoParam:
    """A tensor inside the protobuf."""

    type: TensorType
    proto: onnx.TensorProto

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        try:
            x = numpy_helper.to_array(self.proto)
        except (ValueError, TypeError) as e:
            raise OnnxError(f"tensor {self.proto.name} is damaged: {e}") from None
        return x


@dataclass(frozen=True)
class _PackedFileParam:
    """A tensor of elements of less than a byte in a file of external data."""

    type: TensorType
    name: str
    path: Path
    offset: int
    length: int

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        with self.path.open("rb") as f:
            f.seek(self.offset)
            data = f.read(self.length)
        proto = onnx.TensorProto(name=self.name, data_type=CODE[self.type.dtype], dims=self.type.concrete({}), raw_data=data)
        return _ProtoParam(self.type, proto).load()


def _type(t: onnx.TensorProto) -> TensorType:
    what = f"tensor {t.name}"
    if any(d < 0 for d in t.dims):
        raise OnnxError(f"{what} has shape {list(t.dims)}; a size cannot be negative")
    return TensorType(element(t.data_type, what), tuple(t.dims))


def _check_size(t: onnx.TensorProto, type: TensorType) -> None:
    """Refuses a tensor that declares more elements than its bytes can hold."""
    count = math.prod(t.dims)
    if t.HasField("raw_data"):
        want = (count * type.dtype.bits + 7) // 8
        if len(t.raw_data) != want:
            raise OnnxError(f"tensor {t.name} {type} needs {want} bytes and has {len(t.raw_data)}; the file is damaged")
        return
    given = max(len(f) for f in (t.float_data, t.int32_data, t.int64_data, t.double_data, t.uint64_data))
    if not count <= given * max(1, 8 // type.dtype.bits) or given > count:
        raise OnnxError(f"tensor {t.name} {type} needs {count} elements and has {given}; the file is damaged")


def _external(t: onnx.TensorProto, type: TensorType, source: Source) -> ParamSource:
    what = f"{source.name}: tensor {t.name}"
    fields = {e.key: e.value for e in t.external_data}
    location = fields.get("location", "")
    if source.folder is None:
        raise OnnxError(f"{what} lies in the file {location!r}: give the model's path, not its bytes")
    root = source.folder.resolve()
    path = (root / location).resolve()
    if not location or not path.is_relative_to(root):
        raise OnnxError(f"{what} lies in {location!r}, outside the model's folder {source.folder}")
    want = (math.prod(t.dims) * type.dtype.bits + 7) // 8
    try:
        size = path.stat().st_size
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", want))
    except OSError as e:
        raise OnnxError(f"{what}: {e}") from None
    except ValueError:
        raise OnnxError(f"{what}: offset and length of its external data must be integers") from None
    if not path.is_file():
        raise OnnxError(f"{what} lies in {location!r}, which is no file")
    if length != want or offset < 0 or offset + want > size:
        raise OnnxError(
            f"{what} {type} needs {want} bytes; bytes {offset} to {offset + length} of {location} ({size} bytes) do not fit"
        )
    if type.dtype.bits >= 8:
        return FileParam(type, Stored(path, t.name, type.dtype, tuple(t.dims), offset))
    return _PackedFileParam(type, t.name, path, offset, want)


__all__ = ["CODE", "ELEMENT", "Source", "array", "element", "parameter", "read"]
