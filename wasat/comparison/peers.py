"""What others say: transformers on a folder, llama.cpp on a GGUF file, an artifact, logits that somebody wrote to a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wasat.ir import WasatError
from wasat.quality import log_softmax

from .engines import imported

Windows = Sequence[NDArray[np.int64]]


def log_probabilities(peer: str, path: Path, windows: Windows) -> Iterator[NDArray[np.float64]]:
    """Of the next token at every position of each window: f64[positions, vocabulary]."""
    who = {"transformers": _transformers, "llama.cpp": _llama_cpp, "artifact": _artifact, "logits": _logits}
    return who[peer](path, windows)


def _logits(path: Path, windows: Windows) -> Iterator[NDArray[np.float64]]:
    """A file f[positions, vocabulary] of the windows' logits, one after the other."""
    try:
        logits = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise WasatError(f"{path} is no array file: {e}") from None
    positions = sum(map(len, windows))
    if logits.ndim != 2 or len(logits) != positions or logits.dtype.kind != "f":
        raise WasatError(
            f"{path} holds {logits.dtype}{list(logits.shape)}; of this text it must be logits, floats [{positions}, vocabulary]"
        )
    first = 0
    for ids in windows:
        yield log_softmax(np.asarray(logits[first : first + len(ids)]))
        first += len(ids)


def _transformers(path: Path, windows: Windows) -> Iterator[NDArray[np.float64]]:
    torch = imported("torch", "comparing with transformers")
    transformers = imported("transformers", "comparing with transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for ids in windows:
        with torch.no_grad():
            yield log_softmax(model(torch.from_numpy(ids[None])).logits[0].numpy())


def _llama_cpp(path: Path, windows: Windows) -> Iterator[NDArray[np.float64]]:
    llama_cpp = imported("llama_cpp", "comparing with llama.cpp")
    longest = max(map(len, windows))
    model = llama_cpp.Llama(str(path), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False)
    for ids in windows:
        model.reset()
        model.eval([int(i) for i in ids])
        yield log_softmax(np.array(model.scores[: len(ids)], np.float32))


def _artifact(path: Path, windows: Windows) -> Iterator[NDArray[np.float64]]:
    """Token by token, through the caches that it has."""
    from wasat.runtime import load

    model = load(path)
    longest = max(map(len, windows))
    limit = model.manifest.interface.context
    for ids in windows:
        session = model.session(1, longest if limit is None else min(longest, limit))
        yield log_softmax(np.stack([np.asarray(session.step([[int(i)]]))[0] for i in ids]))
