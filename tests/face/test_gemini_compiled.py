"""The Gemini-style model as a user has it: an artifact that answers and classifies, beside the interpreter's forward pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from tokenizers import Tokenizer, models, pre_tokenizers
from wasat.ir import ArrayParam, Head, Program
from wasat.runtime import ArtifactError, Audio, ContextLimitError, Image, InputError, Model, Video
from wasat.runtime.artifact import digest

import wasat as ws
from wasat.driver import run
from wasat.models import gemini

TINY = gemini.preset("tiny")
CONFIG = replace(
    TINY, text=replace(TINY.text, layers=2, context=64), cross_every=2,
    heads=(gemini.Head("digit", 10, "image"), gemini.Head("scene", 4, "video"), gemini.Head("topic", 3, "text")),
)  # fmt: skip
VOCAB = CONFIG.text.vocab
WORDS = ["what", "is", "this", "and", "that", "red", "blue"]
RNG = np.random.default_rng(11)
RED, BLUE = (RNG.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((20, 30), (17, 9)))
TONE = (0.3 * np.sin(np.arange(700) * 0.4)).astype(np.float32)
CLIP = RNG.integers(0, 256, (5, 12, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def program() -> Program:
    """Gates open, and numbers large enough for pictures to decide what comes next."""
    p = gemini.Gemini(CONFIG).program(seed=2)
    for name, source in p.params.items():
        x = np.full((1,), 0.9, np.float32) if name.endswith("_gate") else source.load()
        p.params[name] = ArrayParam(x * np.float32(3 if "projection.linear" in name else 1), source.type)
    return p


@pytest.fixture(scope="module")
def model(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("gemini")
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="what"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.save(str(folder / "tokenizer.json"))
    gemini.save(folder / "model", CONFIG, program.params, tokenizer=folder / "tokenizer.json", dtype="f32")
    ws.compile(ws.from_pretrained(folder / "model"), folder / "artifact", chunk=8)
    return ws.load(folder / "artifact")


def rows(program: Program) -> dict[str, np.ndarray]:
    """What the encoders make of each medium."""
    times = np.arange(5, dtype=np.float32) / 2
    return {
        "red": run(program, "encode_image", image=RED)["rows"], "blue": run(program, "encode_image", image=BLUE)["rows"],
        "tone": run(program, "encode_audio", audio=TONE)["rows"],
        "clip": run(program, "encode_video", frames=CLIP, times=times)["rows"],
    }  # fmt: skip


MEDIA = {"red": Image(RED), "blue": Image(BLUE), "tone": Audio(TONE, 8000), "clip": Video(CLIP, fps=2)}
PROMPTS = {
    "one picture": ["red", "what is this"],
    "another": ["blue", "what is this"],
    "two pictures, one of them twice": ["red", "and", "blue", "that", "red"],
    "the other way round": ["blue", "and", "red", "that", "blue"],
    "text first, then everything": ["is this", "tone", "clip", "blue"],
    "no picture": ["what is this"],
}


def laid_out(parts: list[str], encoded: dict[str, np.ndarray]) -> tuple[list[int], np.ndarray, list[int]]:
    """One prompt by itself: token ids, the rows of its media, and which of them it sees."""
    ids: list[int] = []
    media: list[np.ndarray] = []
    at: dict[str, range] = {}
    for part in parts:
        if part not in encoded:
            ids += [WORDS.index(w) for w in part.split()]
            continue
        if part not in at:
            start = sum(map(len, media))
            at[part] = range(VOCAB + start, VOCAB + start + len(encoded[part]))
            media.append(encoded[part])
        ids += at[part]
    stacked = np.concatenate(media) if media else np.zeros((1, CONFIG.text.dim), np.float32)
    return ids, stacked, list(range(len(stacked))) if media else [-1]


def continued(program: Program, parts: list[str], encoded: dict[str, np.ndarray], count: int) -> list[int]:
    """The likeliest tokens, from the whole text each time, on the interpreter."""
    ids, media, seen = laid_out(parts, encoded)
    for _ in range(count):
        out = run(program, tokens=np.array([ids]), media=media, seen=np.array([seen]))["logits"]
        ids = [*ids, int(out[0, -1].argmax())]
    return ids[-count:]


def prompt(parts: list[str]) -> list[str | Image | Audio | Video]:
    return [MEDIA.get(p, p) for p in parts]


# -- text out ----------------------------------------------------------------------------------------------------------------
def test_every_row_attends_to_its_own_media(model: Model, program: Program) -> None:
    encoded = rows(program)
    want = [continued(program, parts, encoded, 5) for parts in PROMPTS.values()]
    assert len({tuple(w) for w in want}) > 4  # media and their order decide
    got = model.generate([prompt(parts) for parts in PROMPTS.values()], max_tokens=5)
    assert [g.tokens for g in got] == want
    (alone,) = model.generate(["what is this"], max_tokens=5)
    assert alone.tokens == want[-1]


def test_logits_of_a_batch_are_those_of_each_row_alone(model: Model, program: Program) -> None:
    encoded = rows(program)
    session = model.session(1)
    for parts in PROMPTS.values():
        ids, media, seen = laid_out(parts, encoded)
        want = run(program, tokens=np.array([ids]), media=media, seen=np.array([seen]))["logits"][:, -1]
        session.encode(media=media, seen=np.array([seen]))
        np.testing.assert_allclose(session.step([ids]), want, rtol=1e-4, atol=1e-4)


def test_what_is_seen_must_be_said(model: Model) -> None:
    with pytest.raises(InputError, match=r"encode takes .*seen"):
        model.session(1).encode(media=np.zeros((2, CONFIG.text.dim), np.float32))


# -- classes out -------------------------------------------------------------------------------------------------------------
def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def test_classes_of_pictures_and_clips(model: Model, program: Program) -> None:
    got = model.classify("digit", [Image(RED), Image(BLUE)])
    want = np.stack([run(program, "classify_digit", image=x)["logits"] for x in (RED, BLUE)])
    np.testing.assert_allclose(got, softmax(want), rtol=1e-4, atol=1e-6)
    assert got.shape == (2, 10)
    assert not np.allclose(got[0], got[1], rtol=1e-2)
    want = run(program, "classify_scene", frames=CLIP, times=np.arange(5, dtype=np.float32) / 2)["logits"]
    np.testing.assert_allclose(model.classify("scene", [Video(CLIP, fps=2)])[0], softmax(want), rtol=1e-4, atol=1e-6)


def test_classes_of_texts(model: Model, program: Program) -> None:
    """Prompts of different lengths, with media and without, in one call."""
    encoded = rows(program)
    got = model.classify("topic", [prompt(parts) for parts in PROMPTS.values()] + [[5, 6]])
    for row, parts in zip(got, [*PROMPTS.values(), ["red blue"]]):
        ids, media, seen = laid_out(parts, encoded)
        given = {"tokens": np.array([ids]), "media": media, "seen": np.array([seen]), "last": np.array([len(ids) - 1])}
        want = softmax(run(program, "classify_topic", **given)["logits"][0])
        np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head, inputs, error, message", [
    ("topics", ["what"], InputError, "no head 'topics'; it has digit, scene, topic"),
    ("digit", Image(RED), InputError, "a list of what to classify"),
    ("topic", "what", InputError, "inputs must be a list, not str"),
    ("topic", [], InputError, "a list of what to classify"),
    ("digit", ["what"], InputError, "head digit is of image: give Paths or Images, not str"),
    ("digit", [Audio(TONE, 8000)], InputError, "is of image, and .* is of audio"),
    ("topic", [[-1]], InputError, "prompt 0: token -1 is outside the vocabulary of 64"),
    ("topic", [[1] * 65], ContextLimitError, "prompt 0 has 65 tokens; the model's context is 64"),
])  # fmt: skip
def test_what_cannot_be_classified(
    model: Model, head: str, inputs: list[object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.classify(head, inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("field, value", [("entry", "nothing"), ("of", "text"), ("of", "smell"), ("entry", "encode_audio")])
def test_a_head_that_the_manifest_misdescribes(model: Model, tmp_path: Path, field: str, value: str) -> None:
    folder = Path(shutil.copytree(model.folder, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    next(h for h in manifest["interface"]["heads"] if h["name"] == "digit")[field] = value
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    with pytest.raises(ArtifactError, match=r"head digit is of .*, which entry .* does not take"):
        ws.load(folder)


def test_heads_of_a_model_of_text_alone() -> None:
    """A model without media has heads of text all the same."""
    p = gemini.Gemini(gemini.Config(TINY.text, heads=(gemini.Head("topic", 3, "text"),))).program()
    assert p.interface.heads == (Head("topic", "classify_topic", "text"),)
    assert [v.name for v in p["classify_topic"].inputs] == ["tokens", "last"]
