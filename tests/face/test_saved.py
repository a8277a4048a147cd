"""A program in one file: what was written is read, of every type of parameter; files that are damaged or something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wasat.ir import ArrayParam, CheckpointError, DType, IRError, QTensorType, WasatError, parse_type, type_of

import wasat as ws
from wasat.testing import _random_array

TYPES = [
    *(f"{t}[3, 5]" for t in DType), "f32[]", "f32[0, 4]", "int8b32f16[4, 40]", "int4b32f16[2, 3, 64]", "int4b128f32[2, 200]",
    "q5_0[2, 64]", "q4_k[2, 512]",
]  # fmt: skip
TOKENIZER = Path(__file__).parents[2] / "examples" / "pygemma" / "tokenizer.json"


def program(types: list[str]) -> ws.Program:
    """Reads some of its parameters; the others belong to it all the same."""
    p = ws.trace(ws.nn.Sequential(ws.nn.Linear(4, 4), ws.nn.Linear(4, 2)), {"x": "f32[n, 4]"})
    p.declare(context=12)
    rng = np.random.default_rng(0)
    for i, t in enumerate(types):
        p.params[f"a.{i}"] = ArrayParam(x := _random_array(rng, parse_type(t)), type_of(x))
    return p


@pytest.mark.parametrize("t", TYPES)
def test_parameters_come_back_bit_for_bit(t: str, tmp_path: Path) -> None:
    saved = program([t])
    ws.save_program(saved, tmp_path / "p.program")
    found = ws.load_program(tmp_path / "p.program")
    assert str(found) == str(saved)
    a, b = saved.load("a.0"), found.load("a.0")
    assert type_of(a) == type_of(b) == found.params["a.0"].type
    if isinstance(type_of(a), QTensorType):
        assert np.array_equal(a.values, b.values)
        assert np.array_equal(a.scales, b.scales, equal_nan=True)
        assert (a.offsets is None) == (b.offsets is None) or np.array_equal(a.offsets, b.offsets)
    else:
        assert a.tobytes() == b.tobytes()


def test_all_of_them_in_one_file(tmp_path: Path) -> None:
    saved = program(TYPES)
    ws.save_program(saved, tmp_path / "p.program")
    found = ws.load_program(tmp_path / "p.program")
    assert list(found.params) == list(saved.params)
    for name in saved.params:
        assert np.array_equal(_bytes(saved.load(name)), _bytes(found.load(name))), name
    x = np.ones((2, 4), np.float32)
    for (_, a), (_, b) in zip(ws.run(saved, x=x).items(), ws.run(found, x=x).items(), strict=True):
        np.testing.assert_array_equal(a, b)


def _bytes(x: object) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(getattr(x, "values", x)).tobytes(), np.uint8)


def test_a_model_is_compiled_from_its_file(tmp_path: Path) -> None:
    model = ws.from_pretrained(TOKENIZER.parent)
    optimized, _ = ws.optimize(model, quantize="int4")
    optimized.origin = replace(optimized.origin, rounded="int8")
    for name, p in (("model", model), ("optimized", optimized)):
        ws.save_program(p, tmp_path / name)
        found = ws.load_program(tmp_path / name)
        assert (str(found), found.interface) == (str(p), p.interface)
        assert found.origin.texts["tokenizer.json"] == TOKENIZER.read_text(encoding="utf-8")
        assert replace(found.origin, texts={}) == replace(p.origin, texts={}, tokenizer=None)
    assert (tmp_path / "optimized").stat().st_size < 0.5 * (tmp_path / "model").stat().st_size


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text(str(ws.trace(ws.nn.Linear(4, 2), {"x": "f32[n, 4]"})))
    with pytest.raises(IRError, match="parameter weight has no data"):
        ws.save_program(ws.load_program(tmp_path / "g.txt"), tmp_path / "p.program")
    assert [p.name for p in tmp_path.iterdir()] == ["g.txt"]
    p = program(["f32[2]"])
    p.params["q"] = ArrayParam(x := _random_array(np.random.default_rng(0), QTensorType("int8", (2, 32))), type_of(x))
    p.params["q#scales"] = p.params["a.0"]
    with pytest.raises(IRError, match="two parameters would be one tensor"):
        ws.save_program(p, tmp_path / "p.program")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "p.program"
    ws.save_program(program(["f32[8]", "q5_0[2, 64]"]), path)
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    about = json.loads(header["__metadata__"]["wasat.program"])

    def written(change: dict[str, object] | None) -> Path:
        h = {**header, "__metadata__": {"wasat.program": json.dumps({**about, **change})} if change is not None else {}}
        text = json.dumps(h).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n :])
        return path

    for change, message in [
        (None, "holds tensors and no program"),
        ({"format": 9}, "has format 9 and this is format 1"),
        ({"parameters": {"b": "f32[2]"}}, r"parameter b is f32\[2\]"),
        ({"parameters": {"a.0": "f32[7]"}}, r"parameter a.0 is f32\[7\]"),
        ({"parameters": {"a.0": "f32[n]"}}, "parameters have known sizes"),
        ({"parameters": 3}, "is damaged"), ({"origin": []}, "is damaged"), ({"text": "graph @"}, "p.program:1"),
    ]:
        with pytest.raises(WasatError, match=message):
            ws.load_program(written(change))
    for size in (9, 8 + n, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            ws.load_program(path)
