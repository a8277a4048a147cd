"""What keys and values in fewer bits cost: KL, same top token and perplexity beside a cache in f32, and bytes a token.

    python benchmarks/caches.py MODEL [CACHE ..] [--tokens 512] [--window 256] [--quantize SCHEME]

MODEL is what ``wasat compile`` takes, with a tokenizer. It is compiled with each cache, and its session is given topics of
Python's own documentation, token by token, windows side by side as rows: so every distribution is of the kernels that decode.
Weights are as the file has them, or in SCHEME, on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import wasat as ws
from wasat.quality import log_softmax, quality, text_ids


def distributions(model: ws.Model, windows: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities f32[positions, vocabulary] of each window [rows, positions]."""
    session = model.session(len(windows))
    found = np.stack([log_softmax(session.step(windows[:, i : i + 1])).astype(np.float32) for i in range(windows.shape[1])], 1)
    return list(found)


def bytes_per_token(model: ws.Model) -> float:
    """That one more position of a row takes; rings of windows do not grow."""
    def taken(capacity: int) -> int:
        session = model.session()
        session._slots.reserve(capacity)
        return int(session._slots.nbytes)

    return (taken(1024) - taken(512)) / 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("caches", nargs="*", default=["f16", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--quantize")
    a = parser.parse_args()
    program = ws.load_program(a.model)
    rows = a.tokens // a.window
    ids = text_ids(program, "\n\n".join(topics[k] for k in sorted(topics)[:40]))[: rows * a.window]
    windows = np.array(ids).reshape(rows, a.window)
    base: list[np.ndarray] = []
    print(f"{'cache':6} {'bytes a token':>14} {'KL':>9} {'same top':>9} {'perplexity':>11}")
    for cache in ["f32", *a.caches]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            ws.compile(program, out, cache=cache, quantize=a.quantize, activation=None)
            model = ws.load(out)
            found, size = distributions(model, windows), bytes_per_token(model)
            del model
        base = base or found
        q = quality(base, found, list(windows))
        print(f"{cache:6} {size:14,.0f} {q.kl:9.5f} {q.same_top:9.3f} {q.perplexity:11.3f}", flush=True)


if __name__ == "__main__":
    main()
