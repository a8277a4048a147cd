"""Real GGUF files, from the command line: what they take, how near they stay to their dequantized weights, what they write.

``make real`` runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from wasat.runtime import load

import wasat as ws

sys.path.insert(0, str(Path(__file__).parent))
import fetch

pytestmark = pytest.mark.real

TEXT = (
    "def read_lines(path):\n    \"\"\"The lines of a text file, without their ends.\"\"\"\n    with open(path) as f:\n"
    "        return [line.rstrip() for line in f]\n\nThe capital of France is Paris, and that of Italy is Rome."
)
CASES = {"smollm2.gguf": 0.012, "gemma3-270m.gguf": 0.012}
"""Most KL divergence, nats a token, of products of integers against f32."""


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def wasat(*args: object, stdin: str = "") -> str:
    done = subprocess.run([Path(sys.executable).parent / "wasat", *map(str, args)], capture_output=True, text=True, input=stdin)
    assert done.returncode == 0, f"wasat {' '.join(map(str, args))}\n{done.stderr}"
    return done.stdout


def stepped(folder: Path, tokens: list[int]) -> np.ndarray:
    session = load(folder).session()
    return np.concatenate([session.step([[t]]) for t in tokens])


@pytest.mark.parametrize("name", CASES)
def test_weights_are_computed_on_as_they_are(name: str, tmp_path: Path) -> None:
    file = fetch.fetch(name)
    for activation in ("f32", "int8"):
        wasat("compile", file, "-o", tmp_path / activation, "--activation", activation)
        assert (tmp_path / activation / "weights.safetensors").stat().st_size < 1.01 * file.stat().st_size
    model = load(tmp_path / "f32")
    tokens = model.tokenizer.encode(TEXT)
    assert model.tokenizer.decode(tokens) == TEXT
    program = ws.from_gguf(file)
    want = ws.run(program, tokens=np.array([tokens[:24]]))["logits"][0]
    got = stepped(tmp_path / "f32", tokens)
    np.testing.assert_allclose(got[:24], want, rtol=1e-3, atol=2e-3 * np.abs(want).max())
    exact, near = log_softmax(got), log_softmax(stepped(tmp_path / "int8", tokens))
    divergence = float((np.exp(exact) * (exact - near)).sum(-1).mean())
    print(f"{name}: KL {divergence:.5f}, same token {(exact.argmax(-1) == near.argmax(-1)).mean():.3f}")
    assert divergence < CASES[name]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_llamacpp(name: str) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "gguf_llamacpp.json").read_text(encoding="utf-8"))
    t = Tokenizer.from_str(ws.from_gguf(fetch.fetch(name)).origin.texts["tokenizer.json"])
    found = golden["tokens"][name]
    assert len(found) > 50
    assert [x for x, ids in found if t.encode(x, add_special_tokens=False).ids != ids] == []


PROMPTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "smollm2.gguf": ("The capital of France is", lambda text: "Paris" in text),
    "gemma3-270m.gguf": ("def fibonacci(n):", lambda text: "return" in text),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_it_writes_sense(name: str, tmp_path: Path) -> None:
    wasat("compile", fetch.fetch(name), "-o", tmp_path / "m")
    prompt, fits = PROMPTS[name]
    assert fits(wasat("generate", tmp_path / "m", prompt, "--max-tokens", 30, "--quiet"))


def test_it_answers(tmp_path: Path) -> None:
    """SmolLM2 by its own template: two turns, of which the second is fed only what is new."""
    wasat("compile", fetch.fetch("smollm2.gguf"), "-o", tmp_path / "m")
    said = wasat("chat", tmp_path / "m", "--quiet", stdin="What is the capital of France? Answer in one word.\nAnd of Italy?\n")
    assert "Paris" in said
    assert "Rome" in said
    model = load(tmp_path / "m")
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    reply = model.chat(messages)
    assert reply.finish == "eos"
    messages += [reply.message, {"role": "user", "content": "And of Italy?"}]
    assert model.chat(messages).reused >= reply.prompt_tokens
