"""Makes quantized/*.safetensors: modules that compressed-tensors and AutoAWQ's own code packed, and what they unpack to.

    python tests/golden/make_quantized.py AWQ_PACKING_UTILS.py

with compressed-tensors and transformers installed, and the path of ``awq/utils/packing_utils.py`` of AutoAWQ. Each file has the
tensors of one module ``m`` as a checkpoint has them, ``expected`` (what the package dequantizes to, in f32), and its
configuration; ``mxfp4.npz`` blocks and scales, and what they are.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT = Path(__file__).parent / "quantized"
N, K = 24, 128


def compressed(name: str, format: str, dtype: torch.dtype, **weights: Any) -> None:
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = torch.randn(N, K) * torch.rand(N, 1).exp() + (0 if args.symmetric else 0.3)
    group = {"group": args.group_size}.get(args.strategy, K)
    rows = 1 if args.strategy != "tensor" else N
    if args.strategy == "block":
        rows, group = args.block_structure
    lead = (-(-N // rows), K // group)
    padded = torch.nn.functional.pad(w, (0, 0, 0, lead[0] * rows - N))
    blocks = padded.reshape(lead[0], rows, lead[1], group).transpose(1, 2)
    low, high = (0, 0) if args.type == "float" else (-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1)
    if args.symmetric:
        scale = blocks.abs().amax((2, 3)) / (448 if args.type == "float" else high)
        zero = torch.zeros(lead, dtype=torch.int8)
    else:
        least, most = blocks.amin((2, 3)).clamp(max=0), blocks.amax((2, 3)).clamp(min=0)
        scale = (most - least) / (high - low)
        zero = (low - least / scale).round().clamp(low, high).to(torch.int8)
    scale = scale.to(dtype)
    shape = (1,) if args.strategy == "tensor" else lead
    state = {"weight": w.to(dtype), "weight_scale": scale.reshape(shape)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.reshape(shape)
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(packed, scheme)["weight"].float()
    config = {
        "quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }  # fmt: skip
    store(name, packed, expected, config, str(dtype))


def store(name: str, packed: dict[str, torch.Tensor], expected: torch.Tensor, config: dict[str, Any], dtype: str) -> None:
    tensors = {f"m.{k}": v.contiguous() for k, v in packed.items()} | {"expected": expected.contiguous()}
    save_file(tensors, OUT / f"{name}.safetensors", {"config": json.dumps(config), "dtype": dtype.removeprefix("torch.")})


def awq(source: str) -> None:
    spec = importlib.util.spec_from_file_location("packing_utils", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = torch.randint(-(2**31), 2**31, (K, N // 8), dtype=torch.int64).int()
    zeros = torch.randint(-(2**31), 2**31, (K // 64, N // 8), dtype=torch.int64).int()
    scales = (torch.rand(K // 64, N) + 0.1).half()
    expected = module.dequantize_gemm(words, zeros, scales, 4, 64).float().T
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    store("awq", {"qweight": words, "qzeros": zeros, "scales": scales}, expected, config, "float16")


def mxfp4() -> None:
    """Blocks and scales as gpt-oss has them, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (2, 6, 3), dtype=torch.uint8)
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    np.savez_compressed(OUT / "mxfp4.npz", blocks=blocks.numpy(), scales=scales.numpy(), expected=dense.numpy())


def main() -> None:
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    f16, bf16 = torch.float16, torch.bfloat16
    compressed("w4_group_32", "pack-quantized", bf16, num_bits=4, symmetric=True, strategy="group", group_size=32)
    compressed("w4_group_64_zeros", "pack-quantized", bf16, num_bits=4, symmetric=False, strategy="group", group_size=64)
    compressed("w4_channel_zeros", "pack-quantized", f16, num_bits=4, symmetric=False, strategy="channel")
    compressed("w3_group_32_zeros", "pack-quantized", f16, num_bits=3, symmetric=False, strategy="group", group_size=32)
    compressed("w6_channel", "pack-quantized", bf16, num_bits=6, symmetric=True, strategy="channel")
    compressed("w8_group_64", "pack-quantized", f16, num_bits=8, symmetric=True, strategy="group", group_size=64)
    compressed("w8a8_channel", "int-quantized", bf16, num_bits=8, symmetric=True, strategy="channel")
    compressed("w8_channel_zeros", "int-quantized", f16, num_bits=8, symmetric=False, strategy="channel")
    compressed("w8_tensor", "naive-quantized", bf16, num_bits=8, symmetric=True, strategy="tensor")
    compressed("fp8_tensor", "float-quantized", bf16, num_bits=8, type="float", symmetric=True, strategy="tensor")
    compressed("fp8_channel", "float-quantized", f16, num_bits=8, type="float", symmetric=True, strategy="channel")
    block = {"strategy": "block", "block_structure": [16, 64]}
    compressed("fp8_block", "float-quantized", bf16, num_bits=8, type="float", symmetric=True, **block)
    awq(sys.argv[1])
    mxfp4()
    versions = {"compressed-tensors": compressed_tensors.__version__, "torch": torch.__version__, "autoawq": "0.2.9"}
    versions["transformers"] = importlib.metadata.version("transformers")
    (OUT / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
