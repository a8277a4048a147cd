"""The same model with its channels in another order, and in f32: a base on whose grids nobody finds himself again.

    python benchmarks/shuffled.py MODEL.gguf OUT.gguf [--seed 18] [--keep-order] [--check]

Files of real models at hand are quantized already; whoever quantizes their numbers again finds the blocks of the file, and
loses nothing. So hidden channels, channels of the feed-forward network and those within each head's values change places, which
leaves the function as it is: ``--check`` runs both on 64 tokens and refuses logits that differ by more than 1e-4 of the
largest. Queries and keys keep their rows (positions rotate them in pairs); their columns, along which blocks lie, move. The
file is f32: ``llama-quantize`` reads it, and Wasat. ``--keep-order``: only to f32.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BY_HIDDEN = r"(token_embd|output|attn_q|attn_k|attn_v|ffn_gate|ffn_up)\.weight"
"""Matrices whose columns are hidden channels; of those below it is the rows."""
_TO_HIDDEN = r"(attn_output|ffn_down)\.weight"
_NORMS = r"(output_norm|attn_norm|ffn_norm|post_attention_norm|post_ffw_norm)\.weight"
_KEPT = r"(attn_q_norm|attn_k_norm)\.weight|rope_freqs\.weight"


class Shuffle:
    """One function-preserving order of a model's channels."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], value: int, seed: int) -> None:
        """``value``: channels of one head's values."""
        self.rng = np.random.default_rng(seed)
        self.value = value
        self.hidden = self.rng.permutation(shapes["token_embd.weight"][1])
        self.inner: dict[str, np.ndarray] = {}
        self.heads: dict[str, np.ndarray] = {}
        for name in sorted(shapes):
            layer = name.rpartition(".")[0].rpartition(".")[0]
            if name.endswith("ffn_up.weight"):
                self.inner[layer] = self.rng.permutation(shapes[name][0])
            elif name.endswith("attn_v.weight"):
                orders = [self.rng.permutation(value) for _ in range(shapes[name][0] // value)]
                self.heads[layer] = np.stack(orders)

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        """A tensor, rows first, with its channels moved."""
        layer, _, short = name.rpartition(".")[0].rpartition(".")
        short += ".weight"
        if name.endswith("bias"):
            raise SystemExit(f"{name}: models with biases are not shuffled here")
        if re.fullmatch(_KEPT, short):
            return x
        if re.fullmatch(_NORMS, short):
            return x[self.hidden]
        if short in ("ffn_gate.weight", "ffn_up.weight"):
            x = x[self.inner[layer]]
        elif short == "ffn_down.weight":
            x = x[:, self.inner[layer]]
        elif short == "attn_v.weight":
            x = x[self._values(layer, len(self.heads[layer]))]
        elif short == "attn_output.weight":
            x = x[:, self._values(layer, x.shape[1] // self.value)]
        if re.fullmatch(_BY_HIDDEN, short):
            return x[:, self.hidden]
        if re.fullmatch(_TO_HIDDEN, short):
            return x[self.hidden]
        raise SystemExit(f"{name}: what its channels are is not known here")

    def _values(self, layer: str, heads: int) -> np.ndarray:
        """Rows of the values; or columns of what reads them, where several query heads read one head's values."""
        orders = self.heads[layer]
        each = heads // len(orders)
        return np.concatenate([h * self.value + orders[h // each] for h in range(heads)])


def rewrite(source: Path, out: Path, seed: int | None) -> None:
    """``source`` in f32 at ``out``, shuffled unless ``seed`` is None."""
    r = gguf.GGUFReader(source)
    arch = r.fields["general.architecture"].contents()
    w = gguf.GGUFWriter(out, arch, use_temp_file=False)
    for key, f in r.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = f.types[0]
        w.add_key_value(key, f.contents(), kind, f.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    shapes = {t.name: tuple(int(d) for d in t.shape[::-1]) for t in r.tensors}
    heads = int(r.fields[f"{arch}.attention.head_count"].contents())
    length = r.fields.get(f"{arch}.attention.value_length")
    value = int(length.contents()) if length else shapes["token_embd.weight"][1] // heads
    shuffle = None if seed is None else Shuffle(shapes, value, seed)
    for t in r.tensors:
        x = np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float32).reshape(shapes[t.name])
        w.add_tensor(t.name, np.ascontiguousarray(x if shuffle is None else shuffle(t.name, x)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def check(source: Path, out: Path) -> float:
    """The largest difference of logits, as a part of the largest logit."""
    import wasat as ws
    from wasat.quality import dense

    ids = np.random.default_rng(0).integers(0, 1000, (1, 64))

    def logits(path: Path) -> Any:
        made, _ = ws.optimize(dense(ws.load_program(path)), activation=None, kv_cache=False)
        return ws.Executable(made)(tokens=ids)["logits"]

    a, b = logits(source), logits(out)
    return float(np.abs(a - b).max() / np.abs(a).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--keep-order", action="store_true")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    rewrite(a.model, a.out, None if a.keep_order else a.seed)
    if a.check:
        off = check(a.model, a.out)
        print(f"logits differ by {off:.2e} of the largest")
        if off > 1e-4:
            raise SystemExit("the order of channels changed the function")


if __name__ == "__main__":
    main()
