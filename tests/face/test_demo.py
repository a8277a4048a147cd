"""The main job: models that answer from files and write code, and the page that shows it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from wasat.ir import WasatError
from wasat.runtime.media import Audio, Image, open_media
from wasat.training.curve import write_curve

from wasat.demo import tour as demo
from wasat.demo.report import Card, Chapter, write_page
from wasat.models import gemini
from wasat.recipes.text import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MEDIA = ROOT / "examples" / "media"
QUESTIONS = json.loads((MEDIA / "questions.json").read_text())
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """A page's text, and what its attributes refer to; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "poster", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def check_alone(self) -> None:
        """It fetches nothing."""
        assert all(s.startswith("data:") for s in self.sources)
        assert not {"script", "link", "iframe", "object"}.intersection(self.tags)
        assert not re.search(r"@import|url\(", self.source)
        assert set(re.findall(r"https?://[^\s\"<]+", self.source)) <= {"http://www.w3.org/2000/svg"}  # the name of a language


def shown(tmp_path: Path, folder: Path | None = None, quantize: str | None = None) -> tuple[str, Page]:
    """What the demonstration prints, and its page."""
    file, page = io.StringIO(), tmp_path / "new" / "demo.html"
    demo.main(Console(file=file, width=160), folder, quantize, page)
    assert f"{page}: open it" in file.getvalue().replace("\n", "")
    return file.getvalue(), Page(page)


def tiny(folder: Path, **changes: object) -> Path:
    """A folder with a model of random weights that reads bytes."""
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = gemini.preset("tiny")
    config = replace(config, text=replace(config.text, vocab=257), eos=(256,), **changes)  # type: ignore[arg-type]
    gemini.save(folder, config, gemini.Gemini(config).program().params, tokenizer=folder / "tokenizer.json")
    return folder


def test_a_model_of_all_modalities(tmp_path: Path) -> None:
    """Random weights: the answers are wrong, and the page says so."""
    folder = tiny(tmp_path / "tiny")
    write_curve(folder / "curve.html", "how it went", {"train": [(1, 2.0), (2, 1.0)]})

    text, page = shown(tmp_path, folder)
    page.check_alone()
    for name in ("forward", "encode_image", "encode_audio", "encode_video"):
        assert re.search(rf"^ {name} .* \d+ +$", text, re.MULTILINE)
        assert f"{name}" in page.text
    assert "weights in int8" in text
    assert re.search(r"\d\.\d\d MB  model\.so", text)
    for q in QUESTIONS:
        assert q["question"][:20] in text
        assert q["title"] in page.text
        assert q["question"] in page.text
        assert f"wrong: expected {q['answer']}" in page.text
    assert "0 of 8 are right; without the media (black, silent, still): 0 of 7" in text
    assert "0 of 8 answers are right; with black pictures, silence and clips that stand still, 0 of 7." in page.text
    assert [base64.b64decode(s.split(",")[1]) for s in page.sources] == [
        (MEDIA / name).read_bytes() for q in QUESTIONS for name in q["media"]
    ]
    assert [page.tags.count(t) for t in ("img", "audio", "video")] == [5, 2, 1]
    assert "how it went" in page.text
    assert "cached_attention(" in text
    assert "cached_attention(" in page.text
    assert f"wasat demo --folder {folder}" in page.text


def test_a_model_without_ears_is_not_asked_about_sounds(tmp_path: Path) -> None:
    text, page = shown(tmp_path, tiny(tmp_path / "deaf", audio=None))
    assert "the model takes text, image, video: not asked are A spoken word, Seen and heard" in text
    assert "0 of 6 are right; without the media (black, silent, still): 0 of 5" in text
    assert "A handwritten digit" in page.text
    assert "A spoken word" not in page.text


def test_the_examples(tmp_path: Path) -> None:
    text, page = shown(tmp_path)
    page.check_alone()
    asked = text[text.index("─ gemini-small: a folder") : text.index("─ pygemma: a folder")]
    assert "weights in int8" in asked
    right, blind = map(int, re.search(r"(\d) of 8 are right; without the media .*: (\d) of 7", asked).groups())  # type: ignore[union-attr]
    assert right >= 6
    assert blind <= 3
    written = text[text.index("─ pygemma: a folder") :]
    assert "= softmax(" in written
    assert "5 × ring of 576 positions for a window of 64, 1 × full" in written
    assert "no optimization was missed" in written
    assert "43 weights in all: 11.60 MB -> 1.75 MB" in " ".join(written.split())
    assert "43 weights in all: 11.60 MB -> 1.75 MB" in page.text
    for prompt in demo.PROMPTS:
        assert prompt in text
        assert " ".join(prompt.split()) in page.text
    assert len(re.findall(r"60 tokens in .* s \(.*/s\), finished by length", written)) == len(demo.PROMPTS)
    assert re.search(r"prefill [\d,]+ tokens/s \(512 at once\)\ndecode  [\d,]+ tokens/s \(64, one by one\)", written)
    before, after = map(float, re.search(r"f32 → int4: ([\d.]+) → ([\d.]+)", written).groups())  # type: ignore[union-attr]
    assert before != after
    assert after == pytest.approx(before, rel=0.01)


def test_unquantized_is_the_reference(pygemma: Path, tmp_path: Path) -> None:
    text, _ = shown(tmp_path, pygemma, "f32")
    assert "weights to int" not in text
    before, after = map(float, re.search(r"f32 → f32: ([\d.]+) → ([\d.]+)", text).groups())  # type: ignore[union-attr]
    assert after == pytest.approx(before, abs=1e-4)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "golden" / "hf" / "llama"
    with pytest.raises(WasatError, match="brings no tokenizer"):
        shown(tmp_path, folder)


# -- the page ------------------------------------------------------------------------------------------------------------------
def test_right_and_wrong_are_told_apart(tmp_path: Path) -> None:
    chapter = Chapter("<b>bold", tmp_path, "int8", texts=[("<a>", "<c>", "<fast>")])
    chapter.cards = [
        Card("<seen>", (MEDIA / "digit.png",), "which <one>?", "six", "six", 0.0123, "one"),
        Card("code", (), "1<b>2 =>", "True", "<script>", 0.5, None),
    ]
    write_page(tmp_path / "page.html", [chapter], "<again>")
    page = Page(tmp_path / "page.html")
    page.check_alone()
    for told in (
        "<b>bold", "1 of 2 answers are right; with black pictures, silence and clips that stand still, 0 of 1.",
        "which <one>? six right; without the medium: one 12 ms", "1<b>2 => <script> wrong: expected True 500 ms",
        "<a><c><fast>", "<again>",
    ):  # fmt: skip
        assert told.replace(" ", "") in page.text.replace(" ", "")


# -- examples/media ------------------------------------------------------------------------------------------------------------
def test_the_files_are_those_of_the_held_out_splits(tmp_path: Path) -> None:
    """Made again, they are the same; the MP4 aside, whose encoder is free to differ."""
    spec = importlib.util.spec_from_file_location("make_media", ROOT / "examples" / "make_media.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    assert json.loads((tmp_path / "questions.json").read_text()) == QUESTIONS
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in MEDIA.iterdir()}
    for name in (name for q in QUESTIONS for name in q["media"]):
        made, kept = open_media(tmp_path / name), open_media(MEDIA / name)
        assert type(made) is type(kept)
        if isinstance(made, Image):
            np.testing.assert_array_equal(made.pixels(), kept.pixels())
        elif isinstance(made, Audio):
            np.testing.assert_array_equal(made.samples(8000), kept.samples(8000))
        else:
            (a, when), (b, kept_when) = made.frames(), kept.frames()
            np.testing.assert_array_equal(when, kept_when)
            assert np.abs(a.astype(int) - b).max() <= (16 if name.endswith(".mp4") else 0)
