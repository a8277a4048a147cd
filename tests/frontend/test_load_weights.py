"""Strict loading into a program of one's own: nothing is left random, nothing is left over."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from wasat.frontend import CheckpointError, load_weights, nn
from wasat.ir import Program

import wasat as ws


class Net(nn.Module):
    def __init__(self) -> None:
        self.up, self.layers = nn.Linear(3, 4, bias=True), [nn.Linear(4, 4)]
        self.half = nn.Parameter((4,), "f16")
        self.table = nn.Parameter((2,), "i32")

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        y = self.layers[0](self.up(x)) * self.half.cast("f32")
        return y + self.table.cast("f32").sum()


def program() -> Program:
    return nn.trace(Net(), {"x": "f32[b, 3]"})


def arrays() -> dict[str, np.ndarray]:
    f = np.arange(16, dtype=np.float32)
    return {
        "up.weight": f[:12].reshape(4, 3), "up.bias": f[:4], "layers.0.weight": f.reshape(4, 4),
        "half": f[:4].astype(np.float16), "table": np.array([1, 2], np.int32),
    }  # fmt: skip


def forward(p: Program, a: dict[str, np.ndarray]) -> None:
    x = np.ones((2, 3), np.float32)
    want = (x @ a["up.weight"].T.astype(np.float32) + a["up.bias"]) @ a["layers.0.weight"].T * a["half"].astype(np.float32) + 3
    (got,) = ws.run(p, x=x).values()
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_arrays_become_the_parameters() -> None:
    p = program()
    assert ws.load_weights(p, arrays()) is p
    forward(p, arrays())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_becomes_the_parameters(tmp_path: Path, sharded: bool) -> None:
    a = arrays()
    if sharded:
        import json

        names = list(a)
        for i, part in enumerate((names[:2], names[2:])):
            save_file({n: a[n] for n in part}, tmp_path / f"part-{i}.safetensors")
        places = {n: f"part-{int(i >= 2)}.safetensors" for i, n in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(a, tmp_path / "model.safetensors")
        forward(load_weights(program(), tmp_path / "model.safetensors"), a)
    forward(load_weights(program(), tmp_path), a)
    forward(load_weights(program(), str(tmp_path)), a)


def test_floats_of_16_and_32_bits_are_converted() -> None:
    a = arrays()
    given = {**a, "up.weight": a["up.weight"].astype(ml_dtypes.bfloat16), "half": a["half"].astype(np.float32)}
    p = load_weights(program(), given)
    assert p.load("up.weight").dtype == np.float32
    assert p.load("half").dtype == np.float16
    forward(p, a)


def test_an_array_of_another_library() -> None:
    class Theirs:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return arrays()["up.bias"]

    p = load_weights(program(), {**arrays(), "up.bias": Theirs()})
    np.testing.assert_array_equal(p.load("up.bias"), arrays()["up.bias"])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"up.wieght": "up.weight"},
         ["missing: up.weight f32[4, 3] (is it up.wieght?)", "unknown: up.wieght (is it up.weight?)"]),
        ({"model.half": "half"}, ["missing: half f16[4] (is it model.half?)", "unknown: model.half (is it half?)"]),
        ({"up.bias": np.zeros(5, np.float32)}, ["up.bias is misshaped: [5], the program asks for [4]"]),
        ({"up.weight": np.zeros((3, 4), np.float32)}, ["up.weight is misshaped: [3, 4], the program asks for [4, 3]"]),
        ({"up.bias": np.zeros(4)}, ["up.bias is mistyped: f64, the program asks for f32; convert it: .astype(np.float32)"]),
        ({"up.bias": np.zeros(4, np.int32)}, ["up.bias is mistyped: i32, the program asks for f32"]),
        ({"table": np.zeros(2, np.int64)}, ["table is mistyped: i64, the program asks for i32"]),
        ({"table": np.zeros(2, np.float32)}, ["table is mistyped: f32, the program asks for i32"]),
        ({"up.bias": [0.0] * 4}, ["up.bias is a list, not an array"]),
        ({"up.bias": np.array(["a"] * 4)}, ["up.bias has an element type that is none of ours"]),
        ({"qqq": np.zeros(1)}, ["unknown: qqq"]),
    ],
)  # fmt: skip
def test_all_that_does_not_fit_is_named_and_nothing_changes(change: dict[str, object], says: list[str]) -> None:
    given: dict[str, object] = {**arrays()}
    for name, what in change.items():
        given[name] = given.pop(what) if isinstance(what, str) else what
    p = program()
    before = dict(p.params)
    with pytest.raises(CheckpointError) as e:
        load_weights(p, given)
    for line in says:
        assert line in str(e.value)
    assert p.params == before


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as e:
        load_weights(program(), {"up.weights": np.zeros(1), "up.bias": np.zeros(3, np.float32)})
    text = str(e.value)
    assert text.count("missing:") == 4
    assert "unknown: up.weights" in text
    assert "up.bias is misshaped" in text


def test_what_is_ignored_may_be_left_over() -> None:
    given = {**arrays(), "head.weight": np.zeros(3), "head.bias": np.zeros(3)}
    forward(load_weights(program(), given, ignore=["head.*"]), arrays())
    with pytest.raises(CheckpointError, match=r"unknown: head\.bias"):
        load_weights(program(), given, ignore=["head.w*"])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    a = arrays()
    save_file({**a, "table": a["table"].astype(np.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"table is mistyped: i64, the program asks for i32$"):
        load_weights(program(), tmp_path)
    with pytest.raises(CheckpointError, match="has neither"):
        load_weights(program(), tmp_path / "none")
    with pytest.raises(CheckpointError, match="file, not int"):
        load_weights(program(), 3)  # type: ignore[arg-type]
