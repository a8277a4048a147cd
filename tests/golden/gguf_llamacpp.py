"""Makes ``gguf_llamacpp.json``: what llama.cpp makes of small files and of texts.

    pip install xllamacpp==2026.10.11549 gguf numpy
    python tests/golden/gguf_llamacpp.py [DIR of smollm2.gguf and gemma3-270m.gguf]

Log-probabilities are of tests/gguf_files.py's models; tokens of these with other merges, and of the two real files.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import xllamacpp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import gguf_files as files

POOLS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFG", "0123456789", "  \t\n\r", "\n\n\n", "!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+~`",
    "éèüñßÀÉÎ",
    "日本語中文漢字かなカナ한국어", "🙂🚀❤️", "абвгд", "αβγ", "שלוםعربي", "\u00a0\u2003\u200b\u3000", "½²Ⅷ٣४",
]  # fmt: skip
WORDS = ["don't", "I'LL", "we've", "World", "3.14159", "1234567", "C++", "__init__", "naïve", "   ", "\n\n", "HelloWorld"]


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    source = Path(files.__file__).read_text()
    found = []
    for _ in range(count):
        if rng.random() < 0.3:
            at = rng.randrange(len(source) - 60)
            found.append(source[at : at + rng.randrange(1, 60)])
            continue
        text = ""
        for _ in range(rng.randrange(1, 8)):
            pool = rng.choice(POOLS)
            text += rng.choice(WORDS) if rng.random() < 0.4 else "".join(rng.choices(pool, k=rng.randrange(1, 6)))
            text += " " * (rng.random() < 0.3)
        found.append(text)
    return found


def trained(count: int) -> list[str]:
    """Merges across all borders, of whole texts: where a text is cut shows."""
    names = dict(zip(range(256), files.byte_vocabulary()[0]))
    words = [[names[b] for b in t.encode()] for t in texts(1500, 1)]
    merges = []
    while len(merges) < count:
        pairs = Counter(p for w in words for p in pairwise(w))
        (a, b), _ = pairs.most_common(1)[0]
        merges.append(f"{a} {b}")
        for w in words:
            i = 0
            while i < len(w) - 1:
                if w[i] == a and w[i + 1] == b:
                    w[i : i + 2] = [a + b]
                i += 1
    return merges


class Served:
    """llama.cpp on a file."""

    def __init__(self, path: Path) -> None:
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.cpuparams.n_threads, p.warmup = str(path), 128, 1, False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type(0)
        self.server = xllamacpp.Server(p)

    def ask(self, path: str, **body: Any) -> Any:
        at = self.server.listening_address
        url = (at if at.startswith("http") else f"http://{at}") + path
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    def tokens(self, text: str) -> list[int]:
        return list(self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"])

    def logprobs(self, tokens: list[int]) -> dict[int, float] | None:
        answer = self.ask("/completion", prompt=tokens, n_predict=1, n_probs=12, temperature=0, cache_prompt=False)
        found = answer.get("completion_probabilities")
        return {t["id"]: round(t["logprob"], 4) for t in found[0]["top_logprobs"]} if found else None


def main(real: Path | None) -> None:
    out: dict[str, Any] = {"made by": "xllamacpp 2026.10.11549", "logprobs": {}, "tokens": {}, "merges": trained(700)}
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "m.gguf"
        for name, case in files.LLAMACPP.items():
            files.write(path, case["arch"], keys=case["keys"], tensors=files.strong(case))
            served = Served(path)
            found = ((n, served.logprobs(files.PROMPT[:n])) for n in (6, 10, 16, 24))
            out["logprobs"][name] = {n: p for n, p in found if p is not None}
            del served
        sample = texts(60, 2)
        for pre in ("default", "gpt-2", "llama-bpe", "qwen2", "smollm", "glm4", "deepseek-v3", "seed-coder", "bloom", "viking",
                    "falcon"):  # fmt: skip
            files.write(path, "llama", tokens=files.merged(pre, out["merges"]), tensors=files.weights("llama", 256 + 700 + 1))
            served = Served(path)
            out["tokens"][pre] = [[t, served.tokens(t)] for t in sample]
            del served
        for name, options in (("spm", {}), ("spm without prefix", {"add_space_prefix": False})):
            files.write(path, "llama", tokenizer="llama", tokens=options)
            served = Served(path)
            out["tokens"][name] = [[t, served.tokens(t)] for t in (*sample, "the quick brown fox  jumps", " over")]
            del served
    for name in ("smollm2.gguf", "gemma3-270m.gguf") if real is not None else ():
        served = Served(real / name)  # type: ignore[operator]
        turns = "<|im_start|>user\n<start_of_turn>x<end_of_turn>"
        out["tokens"][name] = [[t, served.tokens(t)] for t in (*texts(60, 3), turns)]
        del served
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":"))
    (HERE / "gguf_llamacpp.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
