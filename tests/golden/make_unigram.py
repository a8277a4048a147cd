"""Makes ``gguf_unigram.json``: small tokenizers trained by SentencePiece, and what it makes of texts.

    pip install sentencepiece==0.2.3
    python tests/golden/make_unigram.py
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

HERE = Path(__file__).parent
RULES = {"½": "1/2", "ａ": "a", "\t": " ", "e\u0301": "\u00e9", "Ⅷ": "VIII", "🙂": ""}
"""None of several letters: the tokenizers package takes a letter with its marks at a time."""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "no prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "identity": {"normalization_rule_tsv": "", "byte_fallback": True, "remove_extra_whitespaces": False},
}
WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "na\u00efve", "½", "ａ", "e\u0301", "Ⅷ", "日本", "語",
    "x", "-",
]  # fmt: skip


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    spaces = ["", " ", " ", "  ", "\t", "\n", "🙂"]
    return ["".join(rng.choice(WORDS) + rng.choice(spaces) for _ in range(rng.randrange(9))) for _ in range(count)]


def main() -> None:
    out: dict[str, Any] = {"made by": f"sentencepiece {sentencepiece.__version__}", "cases": {}}
    with tempfile.TemporaryDirectory() as d:
        here = Path(d)
        (here / "corpus").write_text("\n".join(t.replace("\n", " ") for t in texts(2000, 1)))
        lines = (f"{' '.join(f'{ord(c):X}' for c in a)}\t{' '.join(f'{ord(c):X}' for c in b)}" for a, b in RULES.items())
        (here / "rules").write_text("\n".join(lines) + "\n")
        for name, case in CASES.items():
            options = {"normalization_rule_tsv": str(here / "rules"), **case}
            if not options["normalization_rule_tsv"]:
                del options["normalization_rule_tsv"]
                options["normalization_rule_name"] = "identity"
            sentencepiece.SentencePieceTrainer.train(
                input=str(here / "corpus"), model_prefix=str(here / "m"), model_type="unigram", pad_id=3, minloglevel=2,
                vocab_size=340 if case.get("byte_fallback") else 64, character_coverage=0.995, **options,
            )  # fmt: skip
            sp = sentencepiece.SentencePieceProcessor(str(here / "m.model"))
            m = sentencepiece_model_pb2.ModelProto()
            m.ParseFromString((here / "m.model").read_bytes())
            ids = range(sp.vocab_size())
            kinds = [2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else 1 for i in ids]
            out["cases"][name] = {
                "keys": {
                    "tokens": [sp.IdToPiece(i) for i in ids], "scores": [round(sp.GetScore(i), 4) for i in ids],
                    "token_type": kinds, "add_space_prefix": m.normalizer_spec.add_dummy_prefix,
                    "remove_extra_whitespaces": m.normalizer_spec.remove_extra_whitespaces,
                },
                "charsmap": base64.b64encode(m.normalizer_spec.precompiled_charsmap).decode(),
                "texts": [[t, sp.encode(t), sp.decode(sp.encode(t))] for t in texts(30, 2)],
            }  # fmt: skip
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":"))
    (HERE / "gguf_unigram.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
