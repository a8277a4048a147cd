"""Quantized checkpoints: the numbers are those of the packages that packed them, stored and computed as they are; what does not
fit is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file
from test_huggingface import LLAMA, logits, save, tensors
from wasat.frontend import CheckpointError, ConfigError, from_pretrained
from wasat.frontend.huggingface import from_config
from wasat.frontend.weights.quantized import method_of, read_quantized
from wasat.frontend.weights.safetensors import read_header, read_metadata
from wasat.ir import QArray, QTensorType, TensorType

from wasat.driver import optimize

GOLDEN = Path(__file__).parent.parent / "golden" / "quantized"
CASES = sorted(p.stem for p in GOLDEN.glob("*.safetensors"))
BIG = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_package(case: str) -> None:
    """Exact in f32; the package rounds to the type of the scales, once."""
    path = GOLDEN / f"{case}.safetensors"
    found, about = read_header(path), read_metadata(path)
    expected = np.asarray(found.pop("expected").load())
    method = method_of({"quantization_config": json.loads(about["config"])}, "config.json")
    assert method is not None
    got = read_quantized(method, {"m.weight": TensorType("f32", expected.shape)}, found, path)
    assert got.used == set(found)
    x = got.sources["m.weight"].load()
    assert isinstance(x, QArray) is (not case.startswith("fp8"))
    dense = x.dense() if isinstance(x, QArray) else np.asarray(x)
    dtype = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[about["dtype"]]
    assert_array_equal(dense.astype(dtype).astype(np.float32), expected)
    exact = _exact(x) if isinstance(x, QArray) else None
    if exact is not None:
        assert_array_equal(dense, exact)


def _exact(x: QArray) -> np.ndarray:
    spread = np.repeat(np.arange(x.scales.shape[-1]), x.type.block)[: x.shape[-1]]
    zeros = 0 if x.zeros is None else x.zeros.astype(np.float64)[:, spread]
    return ((x.values - zeros) * x.scales.astype(np.float64)[:, spread]).astype(np.float32)


# -- packers, from the formats as they are published ---------------------------------------------------------------------------
def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [.., k] in words of 32 bits, lowest first and across words."""
    ones = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(ones.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.array(packed, order="C").view(np.int32)


def gptq(
    rng: np.random.Generator, n: int, k: int, bits: int = 4, group: int = 32, sym: bool = False, v2: bool = False,
    act_order: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
    """A module, and its weight [n, k]: (code - zero) * scale, ``act_order`` being the group of each column."""
    group = k if group == -1 else group
    g = np.arange(k) // group if act_order is None else act_order
    groups = -(-k // group)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = np.full((groups, n), 1 << bits - 1) if sym else rng.integers(1, 1 << bits, (groups, n))
    scales = (rng.random((groups, n)) / (1 << bits) + 0.01).astype(np.float16)
    stored = zeros if v2 else zeros - 1
    parts = {
        "qweight": np.ascontiguousarray(words(codes, bits).T), "qzeros": words(stored, bits), "scales": scales,
        "g_idx": g.astype(np.int32),
    }  # fmt: skip
    return parts, ((codes - zeros[g].T) * scales[g].T.astype(np.float64)).astype(np.float32)


def awq(rng: np.random.Generator, n: int, k: int, group: int = 32) -> tuple[dict[str, np.ndarray], np.ndarray]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    scales = (rng.random((k // group, n)) / 16 + 0.01).astype(np.float16)

    def packed(x: np.ndarray) -> np.ndarray:
        return words(x.reshape(len(x), n // 8, 8)[..., order].reshape(len(x), n), 4)

    g = np.arange(k) // group
    w = ((codes - zeros[g]) * scales[g].astype(np.float64)).T.astype(np.float32)
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, np.ascontiguousarray(w)


def channels(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """compressed-tensors' w8a8."""
    q = rng.integers(-128, 128, (n, k), np.int8)
    scales = (rng.random((n, 1)) / 512 + 1e-3).astype(ml_dtypes.bfloat16)
    return {"weight": q, "weight_scale": scales}, (q * scales.astype(np.float64)).astype(np.float32)


def fp8(rng: np.random.Generator, n: int, k: int, size: tuple[int, int] = (32, 32)) -> tuple[dict[str, np.ndarray], np.ndarray]:
    w = (rng.standard_normal((n, k)) * 4).astype(ml_dtypes.float8_e4m3fn)
    scales = (rng.random((-(-n // size[0]), -(-k // size[1]))) / 16).astype(np.float32)
    spread = np.repeat(np.repeat(scales, size[0], 0), size[1], 1)[:n, :k]
    return {"weight": w, "weight_scale_inv": scales}, w.astype(np.float32) * spread


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip
Pack = Callable[[np.random.Generator, int, int], tuple[dict[str, np.ndarray], np.ndarray]]
FORMATS: dict[str, tuple[dict[str, Any], Pack]] = {
    "gptq": (GPTQ, gptq),
    "gptq_v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda r, n, k: gptq(r, n, k, v2=True)),
    "gptq_symmetric": ({**GPTQ, "sym": True}, lambda r, n, k: gptq(r, n, k, sym=True)),
    "gptq_channel_8": ({**GPTQ, "bits": 8, "group_size": -1}, lambda r, n, k: gptq(r, n, k, 8, -1)),
    "gptq_3": ({**GPTQ, "bits": 3}, lambda r, n, k: gptq(r, n, k, 3)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "w8a8": (W8A8, channels),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}, fp8),
}


def quantized(
    folder: Path, config: dict[str, Any], pack: Pack, base: dict[str, Any] = BIG, skip: tuple[str, ...] = ()
) -> tuple[Path, Path]:  # fmt: skip
    """A folder whose linears ``pack`` made, and one that holds the same numbers in f32. The head stays as it is."""
    rng, whole = np.random.default_rng(0), tensors(base)
    small = dict(whole)
    for name in [x for x in whole if x.endswith("_proj.weight") and not any(s in x for s in skip)]:
        parts, whole[name] = pack(rng, *whole[name].shape)
        del small[name]
        small |= {f"{name.removesuffix('weight')}{part}": np.ascontiguousarray(x) for part, x in parts.items()}
    folder.mkdir(exist_ok=True)
    dense = save(folder / "dense", base, whole)
    return save(folder / "small", {**base, "quantization_config": config}, small), dense


def equal_texts(small: Path, dense: Path, **options: Any) -> None:
    ids = np.random.default_rng(1).integers(0, 48, (2, 9))
    a, b = from_pretrained(small), from_pretrained(dense)
    np.testing.assert_allclose(logits(a, ids), logits(b, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_computes_what_its_numbers_say(tmp_path: Path, name: str) -> None:
    config, pack = FORMATS[name]
    small, dense = quantized(tmp_path, config, pack, skip=("layers.1.mlp.up_proj",))  # one stays in full precision
    equal_texts(small, dense)
    a, b = from_pretrained(small), from_pretrained(dense)
    for key, p in b.params.items():
        x = a.params[key].load()
        assert_array_equal(x.dense() if isinstance(x, QArray) else x, p.load())
    kinds = {str(p.type).partition("[")[0] for k, p in a.params.items() if "q_proj" in k}
    assert kinds == {
        "gptq": {"int4zb32f16"}, "gptq_v2": {"int4zb32f16"}, "gptq_symmetric": {"int4b32f16"}, "gptq_3": {"int4zb32f16"},
        "gptq_channel_8": {"int8zb64f16"}, "awq": {"int4zb32f16"}, "w8a8": {"int8b64bf16"}, "fp8": {"f32"},
    }[name]  # fmt: skip


def test_equal_storage_stays_equal_when_it_is_merged(tmp_path: Path) -> None:
    small, _ = quantized(tmp_path, *FORMATS["gptq"])
    program, report = optimize(from_pretrained(small))
    assert report.explain().count("3 linears of one value") == 2
    merged = [v.type for v in program["decode"].params.values() if isinstance(v.type, QTensorType)]
    assert {t.how for t in merged} == {"int4zb32f16"}
    assert len(merged) == 2 * 4  # q, k and v; o; gate and up; down


ORDER = np.random.default_rng(7).permutation(np.arange(64) // 32)
WIDE = np.random.default_rng(8).permutation(np.arange(128) // 32)


def in_order(regular: bool) -> Pack:
    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        g = (ORDER if k == 64 else WIDE).copy()
        if not regular:
            g[np.flatnonzero(g == 1)[0]] = 0
        return gptq(rng, n, k, act_order=g)

    return pack


def test_act_order_takes_the_features_in_the_order_of_the_groups(tmp_path: Path) -> None:
    """q, k and v have one order, and are merged; each order is a gather of what the linears read."""
    small, dense = quantized(tmp_path, {**GPTQ, "desc_act": True}, in_order(True))
    equal_texts(small, dense)
    program = from_pretrained(small)
    assert sum(name.endswith(".order") for name in program.params) == 2  # of 64 and of 128 features
    assert sum(n.op.name == "gather" for n in program["forward"].nodes) == 2 * 4
    served, report = optimize(program)
    assert report.explain().count("3 linears of one value") == 2
    assert {v.type.how for v in served["decode"].params.values() if isinstance(v.type, QTensorType)} == {"int4zb32f16"}


def test_groups_of_different_sizes_become_f32_and_say_so(tmp_path: Path) -> None:
    small, dense = quantized(tmp_path, {**GPTQ, "desc_act": True}, in_order(False))
    equal_texts(small, dense)
    program, report = optimize(from_pretrained(small))
    assert not any(isinstance(v.type, QTensorType) for v in program["decode"].params.values())
    assert "q_proj.weight stays dequantized: its groups are of different sizes" in report.explain()


def test_fp8_becomes_f32_and_says_so(tmp_path: Path) -> None:
    small, _ = quantized(tmp_path, *FORMATS["fp8"])
    assert "q_proj.weight stays dequantized: it is stored in f8" in optimize(from_pretrained(small))[1].explain()


def test_options_of_some_modules(tmp_path: Path) -> None:
    """GPTQModel's dynamic: other bits for some, none for others."""
    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return gptq(rng, n, k, *((8, 64) if k == 128 else (4, 32)))

    config = {**GPTQ, "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 64}, r"-:.*\.up_proj": {}}}
    small, dense = quantized(tmp_path, config, pack, skip=("up_proj",))
    equal_texts(small, dense)


def test_zero_points_of_0_that_were_stored_less_one(tmp_path: Path) -> None:
    """GPTQModel takes one from whole words, of fields of 0 too, and adds it to whole words again."""

    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts, _ = gptq(rng, n, k, v2=True)
        zeros = rng.integers(0, 3, parts["scales"].shape)
        parts["qzeros"] = (words(zeros, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
        codes = (parts["qweight"].T[:, :, None].view(np.uint32) >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
        g = np.arange(k) // 32
        w = (codes.reshape(n, k).astype(np.float64) - zeros[g].T) * parts["scales"][g].T.astype(np.float64)
        return parts, w.astype(np.float32)

    small, dense = quantized(tmp_path, GPTQ, pack)
    a, b = from_pretrained(small).load("model.layers.1.mlp.up_proj.weight"), from_pretrained(dense)
    assert isinstance(a, QArray)
    assert_array_equal(a.dense(), b.load("model.layers.1.mlp.up_proj.weight"))


def test_the_configuration_may_stand_beside(tmp_path: Path) -> None:
    small, dense = quantized(tmp_path, GPTQ, gptq)
    config = json.loads((small / "config.json").read_text())
    (small / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False}))
    del config["quantization_config"]
    (small / "config.json").write_text(json.dumps(config))
    equal_texts(small, dense)


def test_biases_that_packers_add_are_zeros(tmp_path: Path) -> None:
    def pack(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts, w = gptq(rng, n, k)
        return {**parts, "bias": np.full(n, bias, np.float16)}, w

    bias = 0.0
    equal_texts(*quantized(tmp_path / "zeros", GPTQ, pack))
    bias = 0.5
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        from_pretrained(quantized(tmp_path / "others", GPTQ, pack)[0])


# -- one module ----------------------------------------------------------------------------------------------------------------
def module(path: Path, config: dict[str, Any], parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The weight that is read from the tensors of one module, all of which must be accounted for."""
    save_file({f"m.{k}": np.ascontiguousarray(x) for k, x in parts.items()}, path)
    method, found = method_of({"quantization_config": config}, "config.json"), read_header(path)
    assert method is not None
    got = read_quantized(method, {"m.weight": TensorType("f32", shape)}, found, path)
    assert got.used == set(found)
    x = got.sources["m.weight"].load()
    dense = x.dense() if isinstance(x, QArray) else np.asarray(x)
    order = got.orders.get("m.weight")
    return dense if order is None else dense[:, np.argsort(order)]


def packed_group(**weights: Any) -> dict[str, Any]:
    """pack-quantized, one group."""
    group = {"targets": ["re:m$"], "weights": {"strategy": "group", "group_size": 32, **weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}


def test_zero_points_count_where_the_configuration_says_symmetric(tmp_path: Path) -> None:
    parts, w = gptq(np.random.default_rng(2), 16, 64)
    assert_array_equal(module(tmp_path / "m.safetensors", {**GPTQ, "sym": True}, parts, w.shape), w)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
def test_bits_across_words_and_padded_words(tmp_path: Path, bits: int, padded: bool) -> None:
    """compressed-tensors once left the highest bits of a word unused; now integers cross words."""
    rng, (n, k) = np.random.default_rng(bits), (24, 96)
    codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(0, 1 << bits, (n, 3))
    scales = rng.random((n, 3)).astype(np.float16)

    def put(x: np.ndarray) -> np.ndarray:
        if not padded:
            return words(x, bits)
        per = 32 // bits
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % per))).reshape(len(x), -1, per).astype(np.uint32)
        return np.bitwise_or.reduce(x << (np.arange(per, dtype=np.uint32) * np.uint32(bits)), axis=-1).view(np.int32)

    parts = {
        "weight_packed": put(codes), "weight_scale": scales, "weight_zero_point": put(np.pad(zeros.T, ((0, 0), (0, 8)))).T,
        "weight_shape": np.array([n, k]),
    }  # fmt: skip
    if padded:
        parts["weight_zero_point"] = put(zeros.T).T
    else:
        parts["weight_zero_point"] = parts["weight_zero_point"][: -(-n * bits // 32)]
    g = np.arange(k) // 32
    want = ((codes - zeros[:, g]) * scales[:, g].astype(np.float64)).astype(np.float32)
    assert_array_equal(module(tmp_path / "m.safetensors", packed_group(num_bits=bits, symmetric=False), parts, (n, k)), want)


@pytest.mark.parametrize("used", [False, True])
def test_orders_of_compressed_tensors(tmp_path: Path, used: bool) -> None:
    """-1 stands for groups in their order; zero points may lie there as integers of 8 bits."""
    rng, (n, k) = np.random.default_rng(5), (16, 64)
    g = rng.permutation(np.arange(k) // 32) if used else np.arange(k) // 32
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(-8, 8, (n, 2), np.int8)
    scales = rng.random((n, 2)).astype(np.float16)
    parts = {
        "weight_packed": words(codes, 4), "weight_scale": scales, "weight_zero_point": zeros,
        "weight_g_idx": g.astype(np.int32) if used else np.full(k, -1, np.int32),
    }  # fmt: skip
    want = ((codes - 8.0 - zeros[:, g]) * scales[:, g].astype(np.float64)).astype(np.float32)
    config = packed_group(num_bits=4, symmetric=False, actorder="group")
    assert_array_equal(module(tmp_path / "m.safetensors", config, parts, (n, k)), want)


def test_a_shape_that_the_tensors_contradict(tmp_path: Path) -> None:
    parts = {"weight_packed": np.zeros((16, 8), np.int32), "weight_scale": np.ones((16, 2), np.float16)}
    with pytest.raises(CheckpointError, match=r"m: weight_shape says \[16, 63\], the configuration asks for \[16, 64\]"):
        module(tmp_path / "m.safetensors", packed_group(num_bits=4), {**parts, "weight_shape": np.array([16, 63])}, (16, 64))


def test_integers_and_zero_points_out_of_range(tmp_path: Path) -> None:
    four, eight = (packed_group(num_bits=b, type=t) for b, t in ((4, "int"), (8, "float")))
    parts = {"weight": np.full((16, 64), 9, np.int8), "weight_scale": np.ones((16, 2), np.float16)}
    with pytest.raises(CheckpointError, match="m: weight holds 9 to 9, which are no integers of 4 bits"):
        module(tmp_path / "m.safetensors", four, parts, (16, 64))
    parts = {**parts, "weight": parts["weight"].astype(ml_dtypes.float8_e4m3fn), "weight_zero_point": np.ones((16, 2), np.int8)}
    with pytest.raises(CheckpointError, match="m: weight_zero_point of floats is not 0"):
        module(tmp_path / "m.safetensors", eight, parts, (16, 64))


def test_an_order_that_no_product_reads(tmp_path: Path) -> None:
    w = tensors(BIG)
    del w["model.embed_tokens.weight"]
    at = "model.embed_tokens.weight_"
    w |= {
        f"{at}packed": np.zeros((48, 8), np.int32), f"{at}scale": np.ones((48, 2), np.float16),
        f"{at}g_idx": ORDER.astype(np.int32),
    }  # fmt: skip
    config = json.loads(json.dumps(packed_group(num_bits=4)).replace('"re:m$"', '"Embedding"'))
    folder = save(tmp_path / "m", {**BIG, "quantization_config": config}, w)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is in an order of its own"):
        from_pretrained(folder)


@pytest.mark.parametrize("scale", [(), (1,), (16, 1), (16,)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_scales_of_fp8(tmp_path: Path, scale: tuple[int, ...], name: str) -> None:
    rng = np.random.default_rng(6)
    w, s = rng.standard_normal((16, 64)).astype(ml_dtypes.float8_e4m3fn), rng.random(scale).astype(np.float32)
    parts = {"weight": w, name: np.asarray(s, np.float32), "input_scale": np.ones(1, np.float32)}
    want = w.astype(np.float32) * (s.reshape(-1, 1) if s.ndim else s)
    assert_array_equal(module(tmp_path / "m.safetensors", {"quant_method": "fp8"}, parts, (16, 64)), want)


# -- what does not fit ---------------------------------------------------------------------------------------------------------
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantized by bitsandbytes, which is not read .*dequantize\(\)"),
    ({"quant_method": "hqq"}, "quantized by hqq, which is not read .*unquantized"),
    ({}, "quant_method is missing"),
    ({"quant_method": ["gptq"]}, "quant_method = .* must be text"),
    ({**GPTQ, "bits": 5}, "bits is 5; 2, 3, 4 and 8 are read"),
    ({**GPTQ, "bits": "4"}, "bits = '4' must be a whole number"),
    ({**GPTQ, "group_size": 0}, "group_size is 0; expected -1 or a positive number"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
    ({**GPTQ, "rotation": "hadamard"}, "rotated weights are not read"),
    ({**GPTQ, "dynamic": {"+:(": {}}}, "is no pattern"),
    ({**GPTQ, "dynamic": {".*": 3}}, "expected options"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the order 'gemv' is not read"),
    ({"quant_method": "awq", "bits": 8}, "AWQ of 8 bits"),
    ({"quant_method": "awq", "backend": "llm-awq"}, "only files that autoawq packed"),
    ({**W8A8, "format": "marlin-24"}, "format 'marlin-24' of compressed-tensors is not read"),
    ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format 'sparse-24-bitmask'"),
    ({**W8A8, "transform_config": {"config_groups": {"a": 1}}}, "transforms of activations"),
    ({**W8A8, "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}}}, "float and 4"),
    ({**W8A8, "config_groups": {"a": {"targets": ["re:("], "weights": {}}}}, "is no pattern"),
    ({**W8A8, "config_groups": {"a": {"targets": ["Linear"], "weights": {"strategy": "block"}}}}, "block_structure is None"),
    ({**W8A8, "config_groups": {"a": {"targets": ["Linear"]}}}, "weights is missing"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_configurations_that_are_not_read(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = save(tmp_path / "m", {**BIG, "quantization_config": config}, tensors(BIG))
    with pytest.raises(ConfigError, match=message):
        from_pretrained(folder)


def test_a_configuration_alone_says_nothing_of_the_tensors(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {**BIG, "quantization_config": GPTQ}, tensors(BIG))
    with pytest.raises(ConfigError, match="give the folder"):
        from_config(folder / "config.json")


def _without(part: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda t: t.pop(part)


def _as(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda t: t.update({part: np.ascontiguousarray(change(t[part]))})


Q = "model.layers.0.self_attn.q_proj."
DAMAGE: list[tuple[str, Callable[[dict[str, np.ndarray]], object], str]] = [
    ("gptq", _without(Q + "scales"), "q_proj: scales is missing"),
    ("gptq", _without(Q + "qzeros"), "q_proj: qzeros is missing"),
    ("gptq", _as(Q + "qweight", lambda x: x[:-1]), r"q_proj: qweight is misshaped: \[7, 64\], expected \[8, 64\]"),
    ("gptq", _as(Q + "qweight", lambda x: x.astype(np.int64)), "q_proj: qweight is stored as i64; expected i32"),
    ("gptq", _as(Q + "scales", lambda x: x[:, 1:]), "q_proj: scales is misshaped"),
    ("gptq", _as(Q + "g_idx", lambda x: x + 9), "q_proj: g_idx names groups 9 to 10; there are 2"),
    ("gptq", _as(Q + "g_idx", lambda x: x - 3), "q_proj: g_idx names groups -3"),
    ("awq", _as(Q + "qzeros", lambda x: x[:, :1]), "q_proj: qzeros is misshaped"),
    ("awq", _as(Q + "scales", lambda x: x.astype(np.int32)), "q_proj: scales is stored as i32"),
    ("w8a8", _as(Q + "weight", lambda x: x[:, :-4]), "q_proj: weight is misshaped"),
    ("w8a8", _as(Q + "weight_scale", lambda x: x[:3]), "q_proj: weight_scale is misshaped"),
    ("w8a8", lambda t: t.update({Q + "weight_extra": np.zeros(3, np.float32)}), "unexpected: .*q_proj.weight_extra"),
    ("fp8", _as(Q + "weight_scale_inv", lambda x: x[:1, :1]), "q_proj: weight_scale_inv is misshaped"),
    ("fp8", _as(Q + "weight", lambda x: x.astype(np.float32)), "q_proj: weight is stored as f32; expected f8e4m3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[m for _, _, m in DAMAGE])
def test_tensors_that_do_not_fit(
    tmp_path: Path, name: str, damage: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:  # fmt: skip
    small, _ = quantized(tmp_path, *FORMATS[name])
    file = small / "model.safetensors"
    found = {k: np.array(s.load()) for k, s in read_header(file).items()}
    damage(found)
    save_file(found, file)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(small)


def test_weights_that_no_group_has_among_its_targets(tmp_path: Path) -> None:
    config = json.loads(json.dumps(W8A8).replace('"Linear"', '"re:.*q_proj"'))
    with pytest.raises(CheckpointError, match="k_proj: it is quantized, and no group of config_groups has it"):
        from_pretrained(quantized(tmp_path, config, channels)[0])


def test_a_pattern_says_more_of_a_module_than_its_kind(tmp_path: Path) -> None:
    """Whichever group stands first."""
    config = json.loads(json.dumps(W8A8))
    [own] = config["config_groups"].values()
    whole = {"targets": ["Linear"], "weights": {**own["weights"], "strategy": "tensor"}}
    config["config_groups"] = {"all": whole, "own": {**own, "targets": [r"re:.*_proj$"]}}
    from_pretrained(quantized(tmp_path, config, channels)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_changed_is_read_or_named(tmp_path: Path, name: str) -> None:
    """Seeded: fields of the configuration become something else, tensors lose elements or become others."""
    small, _ = quantized(tmp_path, *FORMATS[name])
    file, config = small / "model.safetensors", json.loads((small / "config.json").read_text())
    found = {k: np.array(s.load()) for k, s in read_header(file).items()}
    rng, odd = np.random.default_rng(3), [None, 0, -1, 3, 10**30, 1.5, "x", [], {}, [[1]], True]
    for turn in range(24):
        c, t = json.loads(json.dumps(config)), dict(found)
        if turn % 2:
            at = c["quantization_config"]
            while True:
                key = rng.choice(list(at))
                if isinstance(at[key], dict) and at[key] and rng.random() < 0.8:
                    at = at[key]
                else:
                    break
            at[key] = odd[rng.integers(len(odd))]
        else:
            key = str(rng.choice([k for k in t if "proj" in k]))
            x = t[key]
            t[key] = [x[..., :-1], x[:0], x.reshape(-1), x.astype(np.int16), x[None], np.array(3, x.dtype)][rng.integers(6)]
            t[key] = np.ascontiguousarray(t[key])
        (small / "config.json").write_text(json.dumps(c))
        save_file(t, file)
        with contextlib.suppress(CheckpointError, ConfigError):
            for p in from_pretrained(small).params.values():
                p.load()
