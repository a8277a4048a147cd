"""The program as it is called; the trained example: its text, what the f32 reference makes of it, and an artifact of it."""

from __future__ import annotations

import io
import os
import sys

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import wasat as ws
from wasat.cli import app as cli

ROOT = Path(__file__).resolve().parents[2]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program with these arguments: exit status, standard output, standard error."""

    def call(*argv: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wasat", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as e:
            cli.main()
        got = capsys.readouterr()
        return int(e.value.code or 0), got.out, got.err

    return call


@pytest.fixture(scope="session")
def pygemma() -> Path:
    return ROOT / "examples" / "pygemma"


@pytest.fixture(scope="session")
def int4(pygemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example compiled at int4. Not to be changed."""
    out = tmp_path_factory.mktemp("artifacts") / "int4.wasat"
    ws.compile(ws.from_pretrained(pygemma), out, quantize="int4")
    return out


@dataclass(frozen=True)
class Reference:
    """Log-probabilities f64[tokens, vocab] on the interpreter."""

    tokens: list[int]
    logprobs: np.ndarray

    def compare(self, model: ws.Model) -> tuple[float, float]:
        """How much the loss rises, in nats per token, and the mean KL divergence. The first half is one prefill."""
        half = len(self.tokens) // 2
        session = model.session()
        logits = [session.step([self.tokens[:half]])] + [session.step([[t]]) for t in self.tokens[half:]]
        got, want = log_softmax(np.concatenate(logits)), self.logprobs[half - 1 :]
        after = np.array(self.tokens[half:])
        rise = (want - got)[np.arange(len(after)), after].mean()
        return float(rise), float((np.exp(want) * (want - got)).sum(-1).mean())


@pytest.fixture(scope="session")
def reference(pygemma: Path) -> Reference:
    program = ws.from_pretrained(pygemma)
    from tokenizers import Tokenizer

    text = (Path(__file__).parent / "held_out.txt").read_text()  # frozen: the bounds on the losses are this text's
    tokens = Tokenizer.from_file(str(pygemma / "tokenizer.json")).encode(text).ids[:384]
    return Reference(tokens, log_softmax(ws.run(program, tokens=np.array([tokens]))["logits"][0]))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
