"""Small GGUF files of the families, written with the ``gguf`` package as llama.cpp's converter would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

gguf: Any = __import__("gguf")

TEXT = "the quick brown fox jumps over the lazy dog and runs home"
DIM, HEADS, KV, HEAD, HIDDEN, LAYERS = 64, 4, 2, 16, 96, 2


def byte_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level tokenizer: all bytes, and some words."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in alphabet}
    names |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in names)}
    tokens, merges = [names[b] for b in range(256)], []
    for word in TEXT.split():
        piece = names[32]
        for c in word:
            merges.append(f"{piece} {c}")
            piece += c
            tokens.append(piece)
    return list(dict.fromkeys(tokens)), list(dict.fromkeys(merges))


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds: unknown, begin, end, all bytes, letters and parts of words."""
    tokens, kinds = ["<unk>", "<s>", "</s>"], [2, 3, 3]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    kinds += [6] * 256
    words = [f"▁{w}"[:n] for w in TEXT.split() for n in range(1, len(w) + 2)] + list("abcdefghijklmnopqrstuvwxyz.▁")
    words = [w for w in dict.fromkeys(words) if w not in tokens]
    tokens += words
    kinds += [1] * len(words)
    return tokens, [0.0] * 259 + [-float(i) for i in range(len(words))], kinds


def shapes(arch: str, vocab: int, bias: bool = False, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, by GGUF's names."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, DIM), "output_norm.weight": (DIM,)}
    if not tied and not arch.startswith("gemma"):
        found["output.weight"] = (vocab, DIM)
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (DIM,), "attn_q.weight": (HEADS * HEAD, DIM), "attn_k.weight": (KV * HEAD, DIM),
            "attn_v.weight": (KV * HEAD, DIM), "attn_output.weight": (DIM, HEADS * HEAD), "ffn_norm.weight": (DIM,),
            "ffn_gate.weight": (HIDDEN, DIM), "ffn_up.weight": (HIDDEN, DIM), "ffn_down.weight": (DIM, HIDDEN),
        }  # fmt: skip
        if arch in ("qwen3", "gemma3"):
            layer |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        if arch in ("gemma2", "gemma3"):
            layer |= {"post_attention_norm.weight": (DIM,), "post_ffw_norm.weight": (DIM,)}
        if arch == "qwen2" or bias:
            layer |= {f"attn_{x}.bias": layer[f"attn_{x}.weight"][:1] for x in "qkv"}
        if arch == "llama" and bias:
            layer |= {"attn_output.bias": (DIM,)}
        found |= {f"blk.{i}.{k}": v for k, v in layer.items()}
    return found


def weights(arch: str, vocab: int, **options: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        k: (rng.normal(size=s, scale=0.1) + (1 if "norm" in k else 0)).astype(np.float32)
        for k, s in shapes(arch, vocab, **options).items()
    }  # fmt: skip


def quantized(x: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """The bytes of ``x`` in a format, and its number."""
    q = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(x, q), q


def write(
    path: Path, arch: str, *, kinds: Callable[[str], str] = lambda name: "F32", keys: Mapping[str, Any] | None = None,
    tokenizer: str = "gpt2", tokens: Mapping[str, Any] | None = None, tensors: Mapping[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (), **options: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Writes a model; returns what its tensors stand for. ``kinds``: the format of each matrix; ``keys`` go after ``arch.``."""
    w = gguf.GGUFWriter(path, arch)
    given: dict[str, Any] = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": DIM, "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": HEAD, "attention.value_length": HEAD,
    }  # fmt: skip
    if arch in ("gemma2", "gemma3"):
        given["attention.sliding_window"] = 8
    if arch == "gemma2":
        given["attn_logit_softcapping"] = 1.5
    for k, v in {**given, **(keys or {})}.items():
        if k not in without:
            _add(w, f"{arch}.{k}" if not k.startswith(("general.", "tokenizer.", "split.")) else k, v)
    if tokenizer == "gpt2":
        names, merges = byte_vocabulary()
        names += ["<|end|>", "<|user|>"]
        vocabulary: dict[str, Any] = {
            "model": "gpt2", "pre": "qwen2", "tokens": names, "merges": merges,
            "token_type": [1] * (len(names) - 2) + [3, 4], "eos_token_id": len(names) - 2, "add_bos_token": False,
        }  # fmt: skip
    else:
        names, scores, types = sentencepiece_vocabulary()
        vocabulary = {
            "model": "llama", "tokens": names, "scores": scores, "token_type": types, "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0,
        }  # fmt: skip
    for k, v in {**vocabulary, **(tokens or {})}.items():
        _add(w, f"tokenizer.ggml.{k}", v)
    dense = dict(tensors) if tensors is not None else weights(arch, len(names), **options)
    for name, x in dense.items():
        kind = kinds(name) if x.ndim > 1 else "F32"
        if kind == "F32":
            w.add_tensor(name, x)
        else:
            data, q = quantized(x, kind)
            w.add_tensor(name, data, raw_dtype=q)
            dense[name] = np.asarray(gguf.quants.dequantize(data, q)).astype(np.float32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return dense


def _add(w: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        w.add_bool(key, value)
    elif isinstance(value, int):
        w.add_uint32(key, value)
    elif isinstance(value, float):
        w.add_float32(key, value)
    elif isinstance(value, str):
        w.add_string(key, value)
    else:
        w.add_array(key, value)


# -- what llama.cpp was asked (tests/golden/gguf_llamacpp.py) ------------------------------------------------------------------
PROMPT = [170, 127, 102, 53, 61, 8, 15, 3, 35, 162, 182, 129, 55, 122, 4, 23, 147, 198, 0, 45, 91, 177, 128, 17]
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
LLAMACPP: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", "keys": {}},
    "llama, tied": {"arch": "llama", "keys": {}, "tied": True},
    "llama, biases": {"arch": "llama", "keys": {}, "bias": True},
    "llama, another base": {"arch": "llama", "keys": {"rope.freq_base": 5e5}},
    "llama, linear": {"arch": "llama", "keys": _LINEAR},
    "llama, yarn": {"arch": "llama", "keys": _YARN},
    "llama, frequencies": {"arch": "llama", "keys": {}, "frequencies": True},
    "qwen2": {"arch": "qwen2", "keys": {"rope.freq_base": 1e6}},
    "qwen2, yarn": {"arch": "qwen2", "keys": _YARN},
    "qwen3": {"arch": "qwen3", "keys": {}},
    "gemma3": {"arch": "gemma3", "keys": {}},
    "gemma3, local base": {"arch": "gemma3", "keys": {"rope.freq_base_swa": 5e3}},
    "gemma3, softcap": {"arch": "gemma3", "keys": {"final_logit_softcapping": 3.0}},
}  # fmt: skip


def strong(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of which attention and positions make much of the result."""
    vocab = len(byte_vocabulary()[0]) + 2
    options = {k: True for k in ("bias", "tied") if k in case}
    found = {k: x * np.float32(3 if x.ndim == 2 else 1) for k, x in weights(case["arch"], vocab, **options).items()}
    if "frequencies" in case:
        found["rope_freqs.weight"] = np.linspace(1, 8, HEAD // 2).astype(np.float32)
    return found


def merged(pre: str, merges: list[str]) -> dict[str, Any]:
    """A tokenizer of bytes and of what ``merges`` make."""
    tokens = [*byte_vocabulary()[0][:256], *(m.replace(" ", "") for m in merges), "<|end|>"]
    kinds = [1] * (len(tokens) - 1) + [3]
    return {"pre": pre, "tokens": tokens, "merges": merges, "token_type": kinds, "eos_token_id": len(tokens) - 1}
