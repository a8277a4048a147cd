"""gpt-oss's experts as they are published, in blocks of four bits: the numbers are transformers', and stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_files as files
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file
from wasat.frontend import CheckpointError, from_pretrained
from wasat.frontend.models.layout import Laid
from wasat.frontend.weights.quantized import method_of, read_quantized
from wasat.frontend.weights.safetensors import read_header
from wasat.ir import Program, QArray, TensorType, evaluate

from wasat.driver import optimize

EXPERTS = "model.layers.1.mlp.experts"
CONFIG = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def test_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    golden = np.load(files.FAMILIES.parent / "quantized" / "mxfp4.npz")
    save_file({f"m.{part}_{kind}": golden[kind] for part in ("both", "down") for kind in ("blocks", "scales")}, tmp_path / "m")
    method = method_of(CONFIG, "config.json")
    assert method is not None
    want = golden["expected"].swapaxes(1, 2)
    laid = {"gate": Laid("m.both", True, 0, 2), "up": Laid("m.both", True, 1, 2), "down": Laid("m.down", True)}
    wanted = {"gate": TensorType("f32", (2, 3, 96)), "up": TensorType("f32", (2, 3, 96)), "down": TensorType("f32", (2, 6, 96))}
    got = read_quantized(method, wanted, read_header(tmp_path / "m"), tmp_path, laid)
    assert got.used == set(read_header(tmp_path / "m"))
    for name, rows in (("gate", want[:, ::2]), ("up", want[:, 1::2]), ("down", want)):
        x = got.sources[name].load()
        assert isinstance(x, QArray)
        assert str(x.type).startswith("mxfp4[2, ")
        assert_array_equal(x.dense(), rows)


def folder(path: Path, change: dict[str, Any], **more: Any) -> Path:
    """The golden model, the tensors in ``change`` in place of its own of that layer."""
    config, shapes, _, _ = files.golden("gpt_oss")
    files.write(path, {**config, **more}, shapes)
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"{EXPERTS}.{k}": x for k, x in change.items()}
    save_file({k: x for k, x in tensors.items() if x is not None}, path / "model.safetensors")
    return path


def blocks() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "gate_up_proj": None, "gate_up_proj_blocks": rng.integers(0, 256, (4, 80, 1, 16), np.uint8),
        "gate_up_proj_scales": rng.integers(122, 125, (4, 80, 1), np.uint8),
    }  # fmt: skip


def test_blocks_stay_as_they_are_and_mean_the_same_logits(tmp_path: Path) -> None:
    program = from_pretrained(folder(tmp_path / "q", blocks(), **CONFIG))
    gate, up = (program.load(f"model.layers.1.mlp.{part}_proj") for part in ("gate", "up"))
    assert isinstance(gate, QArray)
    assert isinstance(up, QArray)
    both = np.empty((4, 32, 80), np.float32)
    both[..., ::2], both[..., 1::2] = gate.dense().swapaxes(1, 2), up.dense().swapaxes(1, 2)
    plain = from_pretrained(folder(tmp_path / "p", {"gate_up_proj": both}))
    ids = files.golden("gpt_oss")[2]

    def logits(p: Program) -> np.ndarray:
        return evaluate(p["forward"], {"tokens": ids}, {k: x.load() for k, x in p.params.items()})[0]

    assert_allclose(logits(program), logits(plain), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(plain) - files.golden("gpt_oss")[3]).max() > 0.1
    served = optimize(program)[0]
    assert [n.op.name for n in served["decode"].nodes].count("cached_attention") == 2
    assert [s.window for s in served.interface.states] == [6, 6, None, None]


@pytest.mark.parametrize("change, message", [
    ({"gate_up_proj_scales": None}, "scales is missing"),
    ({"gate_up_proj_blocks": None}, "blocks is missing"),
    ({"gate_up_proj_scales": np.ones((4, 80, 2), np.uint8)}, r"scales is misshaped: \[4, 80, 2\], expected \[4, 80, 1\]"),
    ({"gate_up_proj_blocks": np.ones((4, 80, 1, 16), np.int8)}, "blocks is stored as i8; expected u8"),
    ({"down_proj": None, "down_proj_blocks": np.ones((4, 32, 1, 16), np.uint8)}, "40 weights a row do not fill blocks of 32"),
    ({"gate_up_proj": np.ones((4, 32, 80), np.float32)}, "unexpected: .*gate_up_proj f32"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder(tmp_path / "q", {**blocks(), **change}, **CONFIG))
