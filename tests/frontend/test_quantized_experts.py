"""Quantized checkpoints with experts, each of which has tensors of its own: stacks of them, stored and computed as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import family_files as families
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import logits
from test_quantized_folders import FORMATS, Pack, fp8, gptq
from wasat.frontend import CheckpointError, from_pretrained
from wasat.ir import QArray

from wasat.driver import optimize

OF_EXPERTS = re.compile(r".*\.experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)\.weight\Z")


def folders(path: Path, family: str, config: dict[str, Any], pack: Pack, which: re.Pattern[str]) -> tuple[Path, Path]:
    """A family's folder whose tensors ``which`` are packed, and one with the same numbers in f32."""
    rng = np.random.default_rng(0)
    given, shapes, _, _ = families.golden(family)
    if family == "mixtral":  # whole words and groups
        given["intermediate_size"] = 64
        shapes = {k: tuple(64 if n == 40 else n for n in s) for k, s in shapes.items()}
    dense = families.write(path / "dense", given, shapes)
    whole = load_file(dense / "model.safetensors")
    small = dict(whole)
    for name in [k for k in whole if which.match(k)]:
        parts, whole[name] = pack(rng, *whole[name].shape)
        whole[name] = np.ascontiguousarray(whole[name])
        del small[name]
        small |= {f"{name.removesuffix('weight')}{part}": np.ascontiguousarray(x) for part, x in parts.items()}
    save_file(whole, dense / "model.safetensors")
    families.write(path / "small", {**given, "quantization_config": config}, {})
    save_file(small, path / "small" / "model.safetensors")
    return path / "small", dense


def same_logits(small: Path, dense: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 48, (2, 9))
    a, b = (logits(from_pretrained(folder), ids) for folder in (small, dense))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "fp8"])
def test_experts_are_stacked_as_they_are_stored(tmp_path: Path, name: str) -> None:
    config, pack = FORMATS[name]
    small, dense = folders(tmp_path, "mixtral", config, pack, OF_EXPERTS)
    same_logits(small, dense)
    a, b = from_pretrained(small), from_pretrained(dense)
    stacks = [k for k in a.params if re.search(r"block_sparse_moe\.\w+_proj$", k)]
    assert len(stacks) == 6
    for key in stacks:
        x = a.params[key].load()
        assert isinstance(x, QArray)
        np.testing.assert_array_equal(x.dense(), b.params[key].load())
    optimize(a)


def test_deepseek_in_fp8(tmp_path: Path) -> None:
    """Blocks of scales over all matrices, of experts too; they become f32, and the report says so."""

    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts, w = fp8(rng, n, k, (8, 16))
        parts["weight_scale_inv"] /= 8
        return parts, w / 8

    which = re.compile(r"model\..*_proj(_with_mqa)?\.weight\Z")
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
    small, dense = folders(tmp_path, "deepseek_v3_even", config, pack, which)
    same_logits(small, dense)
    said = from_pretrained(small).origin.dequantized
    assert {k.rpartition(".")[2] for k in said if ".mlp." in k and "experts" not in k} == {
        "gate_proj", "up_proj", "down_proj", "weight",
    }  # fmt: skip
    assert all("stored in f8" in why for why in said.values())


def test_experts_in_orders_of_their_own_become_f32(tmp_path: Path) -> None:
    """A stack has one input: it cannot be brought into the order of each expert."""
    orders = np.random.default_rng(7)

    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return gptq(rng, n, k, act_order=orders.permutation(np.arange(k) // 32))

    small, dense = folders(tmp_path, "mixtral", FORMATS["gptq"][0], pack, OF_EXPERTS)
    same_logits(small, dense)
    said = from_pretrained(small).origin.dequantized
    assert len(said) >= 2
    assert all("an order of their own" in why for why in said.values())


def test_an_expert_that_is_not_quantized_beside_others_is_named(tmp_path: Path) -> None:
    config, pack = FORMATS["gptq"]
    small, _ = folders(tmp_path, "mixtral", config, pack, re.compile(r".*\.experts\.[012]\.w1\.weight\Z"))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1: it is not quantized, and others of its stack are"):
        from_pretrained(small)


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    config, pack = FORMATS["awq"]
    small, _ = folders(tmp_path, "mixtral", config, pack, OF_EXPERTS)
    found = load_file(small / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.scales"
    found[name] = found[name][:, :8]
    save_file({k: np.ascontiguousarray(x) for k, x in found.items()}, small / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3: scales is misshaped"):
        from_pretrained(small)
