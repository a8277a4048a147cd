"""GGUF files from the command line: compiled, their weights stay as they are, and the text is the reference's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rounding import LEVEL, assert_near, bound, spread

pytest.importorskip("gguf")

from gguf_files import write
from wasat.runtime import load

import wasat as ws

KINDS = {"attn_q": "Q5_0", "attn_k": "Q4_1", "attn_v": "Q5_1", "ffn_down": "F16", "attn_output": "Q8_0", "token_embd": "Q5_0"}
TOKENS = [1, 5, 200, 77, 3, 9, 61, 8, 100, 42]
Run = Callable[..., tuple[int, str, str]]


def kind_of(name: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in name), "Q4_0")


def logits(folder: Path, alone: int) -> np.ndarray:
    session = load(folder).session()
    rows = [session.step([TOKENS[:alone]]), *(session.step([[t]]) for t in TOKENS[alone:])]
    return np.concatenate(rows)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_compiled_from_the_command_line(arch: str, run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "m.gguf", tmp_path / "m.wasat"
    write(file, arch, kinds=kind_of, keys={"tokenizer.chat_template": "{{ messages }}"})
    code, _, said = run("compile", file, "-o", out, "--activation", "f32")
    assert code == 0, said
    program = ws.from_gguf(file)
    want = ws.run(program, tokens=np.array([TOKENS]))["logits"][0]
    np.testing.assert_allclose(logits(out, 4), want[3:], rtol=1e-5, atol=4e-6)
    assert (out / "weights.safetensors").stat().st_size < 1.2 * file.stat().st_size
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    code, text, _ = run("generate", out, "the quick", "--max-tokens", 5, "--quiet")
    assert code == 0
    assert text
    code, text, said = run("plan", file)
    assert (code, "weights" in text) == (0, True), said
    code, text, _ = run("explain", file)
    assert "operations on weights that stay q5_0" in text
    assert "operations on weights that stay f16" in text


def test_products_of_integers_stay_near(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "m.gguf", tmp_path / "m.wasat"
    write(file, "llama", kinds=kind_of)
    ws.compile(ws.from_gguf(file), out)
    program, _ = ws.optimize(ws.from_gguf(file), kv_cache=False)
    tokens, got = np.array([TOKENS]), logits(out, 4)
    want = ws.run(program, tokens=tokens)["logits"][0][3:]
    params = {k: program.load(k) for k in program["forward"].params}
    [fine], [coarse] = (spread(program["forward"], {"tokens": tokens}, params, level=n) for n in (0, LEVEL))
    assert_near(got, want, bound(want, coarse[0, 3:]))
    assert (np.abs(got - want) <= bound(want, fine[0, 3:])).mean() > 0.98  # but where a code is half-way between two
    assert (got != ws.run(ws.from_gguf(file), tokens=tokens)["logits"][0][3:]).any()


def test_what_is_no_gguf_file_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4" * 10)
    code, _, said = run("compile", tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert (code, "is no GGUF file: it begins with" in said) == (1, True)
    code, _, said = run("compile", tmp_path / "none.gguf", "-o", tmp_path / "out")
    assert (code, "none.gguf does not exist" in said) == (1, True)
