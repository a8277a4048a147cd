"""Generation against the interpreter, and everything that ends or shapes a text."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_model import BOS, CHUNK, CONTEXT, EOS, VOCAB, Reference, edit_manifest
from wasat.ir import Program
from wasat.runtime import ArtifactError, ContextLimitError, Generation, InputError, Model, SamplingOptions, Tokenizer, load

PROMPT = "naïve "
LONG = "a prompt of several chunks, longer than any window: " * 2


def _greedy(program: Program, model: Model, prompt: str, count: int) -> list[int]:
    tokens = Reference(program).greedy(model.tokenizer.encode(prompt), count)
    assert EOS not in tokens
    return tokens


@pytest.mark.parametrize("prompt", ["x", PROMPT, LONG])
def test_greedy_equals_the_interpreter(model: Model, program: Program, prompt: str) -> None:
    want = _greedy(program, model, prompt, 40)
    began = time.perf_counter()
    (got,) = model.generate(prompt, max_tokens=40)
    took = time.perf_counter() - began
    assert got.tokens == want
    assert got.text == model.tokenizer.decode(want)
    assert got.finish == "length"
    assert got.prompt_tokens == len(prompt.encode())
    assert got.steps == 39
    assert got.prefill_seconds > 0
    assert got.decode_seconds > 0
    assert got.prefill_seconds + got.decode_seconds < took
    assert "40 tokens in" in got.summary()
    assert got.summary().endswith("finished by length")


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=2.0, top_p=0.9, repetition_penalty=1.3, seed=4)]
)
def test_a_row_does_not_depend_on_the_others(model: Model, options: SamplingOptions) -> None:
    prompts = [PROMPT, "b", LONG, "c" * CHUNK]
    batch = model.generate(prompts, max_tokens=25, options=options)
    for row, prompt in enumerate(prompts):
        others = ["zz"] * row + [prompt] + ["y" * 30]
        assert model.generate(others, max_tokens=25, options=options)[row].tokens == batch[row].tokens
    if options.temperature == 0:
        assert [model.generate(p, max_tokens=25)[0].text for p in prompts] == [g.text for g in batch]


def test_equal_prompts_of_a_batch_are_sampled_apart(model: Model) -> None:
    a, b = model.generate([PROMPT, PROMPT], max_tokens=20, options=SamplingOptions(temperature=1.0))
    assert a.tokens != b.tokens
    again = model.generate([PROMPT, PROMPT], max_tokens=20, options=SamplingOptions(temperature=1.0))
    assert [g.tokens for g in again] == [a.tokens, b.tokens]


def test_eos_ends_a_text(model: Model, program: Program, copy: Path) -> None:
    want = _greedy(program, model, PROMPT, 12)
    edit_manifest(copy, "interface.generation.eos", [EOS, want[7]])
    at = want.index(want[7])
    (got,) = load(copy).generate(PROMPT, max_tokens=12)
    assert (got.tokens, got.finish, got.steps) == (want[:at], "eos", at)


def test_stop_tokens_end_a_text_and_other_rows_go_on(model: Model, program: Program) -> None:
    want, other = _greedy(program, model, PROMPT, 12), _greedy(program, model, LONG, 12)
    stop = next(t for t in want if t not in other)
    first, second = model.generate([PROMPT, LONG], max_tokens=12, stop_tokens=[stop])
    assert (first.tokens, first.finish) == (want[: want.index(stop)], "stop")
    assert (second.tokens, second.finish) == (other, "length")


class _Scripted(Model):
    """A model whose every next token is set: what is tested is what becomes of the text."""

    def __init__(self, model: Model, script: list[int]) -> None:
        super().__init__(model.engine)
        self.script = script

    def session(self, batch: int = 1, context: int | None = None) -> _ScriptedSession:  # type: ignore[override]
        return _ScriptedSession(self.script, batch)


class _ScriptedSession:
    def __init__(self, script: list[int], batch: int) -> None:
        self.script, self.batch, self.at = script, batch, 0

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        logits = np.zeros((self.batch, VOCAB), np.float32)
        logits[:, self.script[self.at]] = 1.0
        self.at += 1
        return logits


@pytest.mark.parametrize("stop, text, finish, used", [
    ([], "one; two; drei 🙂", "length", 19),
    (["; "], "one", "stop", 5),
    ("; ", "one", "stop", 5),
    (["two", "e; t"], "on", "stop", 6),
    (["🙂"], "one; two; drei ", "stop", 19),
    (["never", " 🙂!"], "one; two; drei 🙂", "length", 19),
])  # fmt: skip
def test_stop_strings(model: Model, stop: list[str] | str, text: str, finish: str, used: int) -> None:
    script = model.tokenizer.encode("one; two; drei 🙂")
    pieces: list[tuple[int, str]] = []
    (got,) = _Scripted(model, script).generate(
        "x", max_tokens=len(script), stop=stop, stream=lambda row, piece: pieces.append((row, piece))
    )
    assert (got.text, got.finish, got.tokens) == (text, finish, script[:used])
    assert "".join(piece for _, piece in pieces) == text
    assert all(row == 0 and piece and "\ufffd" not in piece for row, piece in pieces)


def test_a_stop_string_completed_by_the_last_bytes(model: Model) -> None:
    """U+FFFD stands only at the end, when nothing can complete the character; a stop string may wait for it."""
    script = [*model.tokenizer.encode("ab"), model.tokenizer.encode("漢")[0]]
    (got,) = _Scripted(model, script).generate("x", max_tokens=3)
    assert got.text == "ab\ufffd"
    assert got.finish == "length"
    (got,) = _Scripted(model, script).generate("x", max_tokens=3, stop="b\ufffd")
    assert got.text == "a"
    assert got.finish == "stop"


def test_a_stream_is_the_text_in_pieces(model: Model) -> None:
    texts = ["", ""]

    def collect(row: int, piece: str) -> None:
        assert piece
        texts[row] += piece

    got = model.generate([PROMPT, LONG], max_tokens=30, options=SamplingOptions(temperature=3.0), stream=collect)
    assert texts == [g.text for g in got]


def test_token_prompts_and_empty_ones(model: Model, program: Program, copy: Path) -> None:
    ids = model.tokenizer.encode(PROMPT)
    assert model.generate([ids], max_tokens=5)[0].tokens == model.generate(PROMPT, max_tokens=5)[0].tokens
    assert model.generate([np.array(ids)], max_tokens=5)[0].tokens == model.generate(PROMPT, max_tokens=5)[0].tokens  # type: ignore[list-item]
    assert model.generate([], max_tokens=5) == []
    assert model.generate("", max_tokens=5)[0].tokens == Reference(program).greedy([BOS], 5)
    edit_manifest(copy, "interface.generation.bos", None)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        load(copy).generate(["a", ""], max_tokens=5)


def test_logprobs(model: Model, program: Program) -> None:
    (got,) = model.generate(
        PROMPT, max_tokens=6, logprobs=3, options=SamplingOptions(temperature=2.0, top_k=9, repetition_penalty=1.5)
    )
    assert got.logprobs is not None
    assert [x.token for x in got.logprobs] == got.tokens
    prompt = model.tokenizer.encode(PROMPT)
    logits = list(Reference(program).feed(prompt + got.tokens))[len(prompt) - 1 : -1]
    for entry, x in zip(got.logprobs, logits, strict=True):
        p = x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64))
        assert entry.logprob == pytest.approx(p[entry.token], abs=1e-4)
        assert [t for t, _ in entry.top] == np.argsort(-p)[:3].tolist()
    assert model.generate(PROMPT, max_tokens=2)[0].logprobs is None


@pytest.mark.parametrize("room, asked", [(5, None), (5, 5), (1, None), (1, 1)])
def test_the_context_is_filled_to_its_end(model: Model, room: int, asked: int | None) -> None:
    (got,) = model.generate([[1] * (CONTEXT - room)], max_tokens=asked)
    assert (len(got.tokens), got.finish) == (room, "length")


def test_a_summary_says_how_fast() -> None:
    made = Generation("", [5, 6, 7], "stop", None, 10, 2, prefill_seconds=0.5, decode_seconds=0.25)
    assert made.summary() == "10 prompt tokens in 0.500 s (20/s), 3 tokens in 0.250 s (8.0/s), finished by stop"
    at_once = replace(made, tokens=[5], finish="eos", steps=0, prefill_seconds=0.0)
    assert at_once.summary() == "10 prompt tokens in 0.000 s, 1 tokens, finished by eos"
    assert replace(made, decode_seconds=0.0).summary().endswith("3 tokens, finished by stop")


def test_what_ends_a_text_twice_is_its_own_end(model: Model, copy: Path) -> None:
    (first,) = model.generate(PROMPT, max_tokens=1)
    edit_manifest(copy, "interface.generation.eos", first.tokens)
    for stop_tokens in ((), first.tokens, [VOCAB - 1]):
        (got,) = load(copy).generate(PROMPT, max_tokens=1, stop_tokens=stop_tokens)
        assert (got.tokens, got.finish, got.steps) == ([], "eos", 0)


def test_the_context_limit_says_so(model: Model) -> None:
    def never(row: int, piece: str) -> None:
        raise AssertionError

    with pytest.raises(ContextLimitError, match=rf"prompt 1 has {CONTEXT - 5} tokens .* {CONTEXT}: shorten .* at most 5$"):
        model.generate([[1], [1] * (CONTEXT - 5)], max_tokens=6, stream=never)
    with pytest.raises(ContextLimitError, match="nothing can follow it"):
        model.generate([[1] * CONTEXT], stream=never)


@pytest.mark.parametrize("arguments, message", [
    ({"prompts": [1, 2]}, "put token ids into a list"),
    ({"prompts": [[VOCAB]]}, f"token {VOCAB} is outside"),
    ({"prompts": "a", "max_tokens": 0}, "max_tokens is 0"),
    ({"prompts": "a", "logprobs": -1}, "logprobs is -1"),
    ({"prompts": "a", "stop_tokens": [VOCAB]}, f"stop_tokens: a token is {VOCAB}"),
    ({"prompts": "a", "stop": [""]}, "empty stop string"),
])  # fmt: skip
def test_what_cannot_be_asked(model: Model, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(**{"max_tokens": 3, **arguments})


def test_without_a_tokenizer_there_are_tokens(copy: Path, model: Model) -> None:
    edit_manifest(copy, "files.tokenizer%json", ...)
    bare = load(copy)
    (got,) = bare.generate([[1, 2, 3]], max_tokens=4)
    assert got.tokens == model.generate([[1, 2, 3]], max_tokens=4)[0].tokens
    assert got.text == ""
    with pytest.raises(ArtifactError, match=r"holds no tokenizer\.json: give token ids"):
        bare.generate("text", max_tokens=4)
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        bare.generate([[1]], max_tokens=4, stop="x")


@pytest.mark.parametrize("stop, text, used", [
    ("<eos>", "ab", 3), (["b<eos>"], "a", 3), ("<eos>c", "ab", 4), (["c", "<eos>"], "ab", 3), ("bc", "a", 4),
])  # fmt: skip
def test_special_tokens_in_stop_strings(model: Model, copy: Path, stop: str | list[str], text: str, used: int) -> None:
    edit_manifest(copy, "interface.generation.eos", [])
    letters = load(copy)
    script = [letters.tokenizer.encode(c)[0] for c in "ab"] + [EOS] + [letters.tokenizer.encode(c)[0] for c in "cd"]
    (got,) = _Scripted(letters, script).generate("x", max_tokens=5, stop=stop)
    assert (got.text, got.finish, got.tokens) == (text, "stop", script[:used])
    assert _Scripted(letters, script).generate("x", max_tokens=5)[0].text == "abcd"


NONE_OF_THESE = (None, 1.5, "3", "", b"3", True, -1, [1], {}, object(), float("nan"), 10**30, -(10**30), "\ud800")


@pytest.mark.parametrize("name, good", [
    ("prompts", (b"", "3", "")), ("max_tokens", (None,)), ("stop", ("3", {}, [1])), ("stop_tokens", ([1], {})),
    ("stream", (None,)), ("logprobs", (None, 10**30)), ("options", (None,)), ("inputs", (None, {})),
])  # fmt: skip
def test_odd_arguments_are_refused_before_any_step(
    model: Model, monkeypatch: pytest.MonkeyPatch, name: str, good: tuple[object, ...]
) -> None:
    monkeypatch.setattr(model, "session", lambda *a: pytest.fail("a step"))
    for x in NONE_OF_THESE:
        if not any(x is g or (type(x) is type(g) and x == g) for g in good):
            with pytest.raises(InputError):
                model.generate(**{"prompts": "a", "max_tokens": 3, name: x})  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[-1], [2**31], [2**63], [10**30], [VOCAB], "\ud800", None, 3, [1.0], [None], [True], [[1]]])
def test_what_is_no_prompt(model: Model, monkeypatch: pytest.MonkeyPatch, prompt: object) -> None:
    monkeypatch.setattr(model, "session", lambda *a: pytest.fail("a step"))
    with pytest.raises(InputError):
        model.generate(["a", prompt], max_tokens=3)  # type: ignore[list-item]


def test_generators_are_read_once(model: Model) -> None:
    want = model.generate(["a", [1, 2]], max_tokens=5)
    got = model.generate((p for p in ("a", iter([1, 2]))), np.int64(5), stop=iter(["\0\0"]), stop_tokens=iter([]))
    assert [g.tokens for g in got] == [g.tokens for g in want]
    (one,) = model.generate("a", max_tokens=5, stop_tokens=(t for t in np.array(want[0].tokens[1:2])))
    assert one.tokens == want[0].tokens[: want[0].tokens.index(want[0].tokens[1])]


@pytest.mark.parametrize("text", [None, b"a", 3, "a\udfff"])
def test_a_tokenizer_refuses_what_is_no_text(model: Model, text: object) -> None:
    with pytest.raises(InputError, match="a text"):
        model.tokenizer.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], [None], ["a"]])
def test_a_tokenizer_refuses_what_is_no_token(model: Model, ids: list[object]) -> None:
    for given in (ids, tuple(ids)):
        with pytest.raises(InputError, match="token"):
            model.tokenizer.decode(given)  # type: ignore[arg-type]
    assert isinstance(model.tokenizer, Tokenizer)
