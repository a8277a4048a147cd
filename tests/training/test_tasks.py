"""Tasks: answers are true, splits share nothing that counts, the seed alone decides, baselines are what they say."""

from __future__ import annotations

import re
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wasat.recipes.tasks import (  # fmt: skip
    AudioData,
    Clips,
    Code,
    Digits,
    Example,
    ImageData,
    Match,
    Scenes,
    Sources,
    Speech,
    Split,
    Stories,
    Task,
    TaskError,
    Tones,
    VideoData,
    majority,
)
from wasat.recipes.tasks.base import wording
from wasat.recipes.tasks.code import OPERATIONS, result
from wasat.recipes.tasks.digits import enlarged
from wasat.recipes.tasks.speech import WORDS, Voices
from wasat.recipes.tasks.world import COLOURS, QUARTERS, SHAPES, Thing, held_out, picture, unseen

ROOT = Path(__file__).parents[2]
RATE = 8000


@pytest.fixture(scope="module")
def voices() -> Voices:
    return Voices(ROOT / "examples" / "speech", RATE)


@pytest.fixture(scope="module")
def tasks(voices: Voices) -> list[Task]:
    files = sorted((ROOT / "ir").glob("*.py"))
    return [
        Digits(), Scenes(), Stories(), Speech(voices, RATE), Match(Digits(), voices, RATE), Tones(RATE, RATE), Clips(), Code(),
        Sources(files),
    ]  # fmt: skip


def question(e: Example) -> str:
    return str(e.parts[-1])


def same(a: Example, b: Example) -> bool:
    def arrays(e: Example) -> list[np.ndarray]:
        return [x for p in e.parts if not isinstance(p, str) for x in vars(p).values() if isinstance(x, np.ndarray)]

    texts = [[p for p in e.parts if isinstance(p, str)] + [e.answer, e.kind] for e in (a, b)]
    return texts[0] == texts[1] and all(map(np.array_equal, arrays(a), arrays(b)))


def test_the_seed_and_the_index_decide(tasks: list[Task]) -> None:
    for task in tasks:
        for split in ("train", "held_out"):
            first, again = (task.example(split, i) for i in (3, 3))
            assert same(first, again)
            assert not all(same(first, task.example(split, i)) for i in range(4, 30))
    assert not all(same(Code(1).example("train", i), Code(2).example("train", i)) for i in range(10))


def test_media_fit_their_types(tasks: list[Task]) -> None:
    for part in (p for task in tasks for p in task.example("train", 0).parts):
        if isinstance(part, ImageData):
            assert (part.pixels.dtype, part.pixels.shape) == (np.uint8, (32, 32, 3))
        elif isinstance(part, AudioData):
            assert (part.wave.dtype, part.wave.shape, part.rate) == (np.float32, (RATE,), RATE)
            assert 0.05 < np.abs(part.wave).max() <= 1
        elif isinstance(part, VideoData):
            assert (part.frames.dtype, part.frames.shape) == (np.uint8, (8, 32, 32, 3))
            assert part.times.dtype == np.float32
            assert np.all(np.diff(part.times) > 0)


def test_questions_of_the_held_out_split_are_new_in_words_that_are_not(tasks: list[Task]) -> None:
    for task in tasks:
        if isinstance(task, Code | Sources):
            continue
        asked: dict[Split, set[str]] = {s: {question(task.example(s, i)) for i in range(700)} for s in ("train", "held_out")}
        assert not asked["train"] & asked["held_out"], task.name
        words = {s: {w for q in asked[s] for w in re.findall(r"\w+", q)} for s in asked}
        assert words["held_out"] <= words["train"], task.name


def test_wording() -> None:
    rng = np.random.default_rng(0)
    assert {wording(rng, "held_out", "abc", "xyz") for _ in range(99)} == {"b y", "c z"}
    assert len({wording(rng, "train", "abc", "xyz") for _ in range(99)}) == 7


def test_held_out_pairs() -> None:
    """One in four; each colour and shape is on both sides."""
    every = [(c, s) for c in COLOURS for s in SHAPES]
    kept = {x for x in every if held_out(*x)}
    assert len(kept) == len(every) / 4
    for side in (kept, set(every) - kept):
        assert {c for c, _ in side} == set(COLOURS)
        assert {s for _, s in side} == set(SHAPES)


def test_held_out_arrangements() -> None:
    """One in eight or so, whatever the order and the size of what is there; each thing is in each place in training."""
    one = [(Thing(c, s, 0.5, 0.5, 0.1), p) for c in COLOURS for s in SHAPES for p in range(len(QUARTERS))]
    two = [(a, b) for a in one for b in one if a[0].colour < b[0].colour and a[0].shape != b[0].shape and a[1] != b[1]]
    kept = [pair for pair in two if unseen(*zip(*pair))]
    assert 0.11 <= len(kept) / len(two) <= 0.14
    assert {x for pair in set(two) - set(kept) for x in pair} == set(one) == {x for pair in kept for x in pair}
    for pair in two[::97]:
        assert unseen(*zip(*pair)) == unseen(*zip(*pair[::-1]))
        assert unseen(*zip(*pair)) == unseen([replace(t, radius=0.2) for t, _ in pair], [p for _, p in pair])


def seen(pixels: np.ndarray) -> list[tuple[str, str]]:
    """Colour and corner of each thing in a picture, by its brightest pixels."""
    found = []
    for colour, rgb in COLOURS.items():
        hit = np.argwhere(np.abs(pixels.astype(int) - rgb).max(axis=2) < 3)
        if len(hit):
            y, x = hit.mean(axis=0) / len(pixels)
            found.append((colour, ("top" if y < 0.5 else "bottom") + (" left" if x < 0.5 else " right")))
    return found


def test_scenes_answer_what_is_in_the_picture() -> None:
    task = Scenes()
    checked: Counter[str] = Counter()
    for i in range(300):
        e = task.example("held_out" if i % 3 else "train", i)
        assert isinstance(e.parts[0], ImageData)
        there = dict(seen(e.parts[0].pixels))
        if e.kind == "count":
            assert e.answer == f" {len(there)}"
        elif e.kind == "colour":
            assert e.answer.strip() in there
        elif e.kind == "place" and (m := re.search(r"the (\w+) one", question(e))):
            assert e.answer == f" {there[m[1]]}"
        elif e.kind == "caption":
            told = [thing.split()[1] for thing in e.answer.strip().split(", ")]
            assert told == sorted(there, key=lambda c: list(QUARTERS).index(there[c]))
        elif e.kind == "relation" and (m := re.search(r"the (\w+) one (?:somewhere )?(.*) the (\w+) one", question(e))):
            (x, y), (u, v) = (QUARTERS[there[m[k]]] for k in (1, 3))
            truth = {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[m[2]]
            assert e.answer == (" yes" if truth else " no")
        elif e.kind == "exists" and e.answer == " yes":
            assert re.search(rf"({'|'.join(there)}) ", question(e))
        else:
            continue
        checked[e.kind] += 1
    assert min(checked.values()) >= 10
    assert set(checked) == {"count", "colour", "place", "caption", "relation", "exists"}


def new(told: list[tuple[str, str, str]]) -> bool:
    """Whether colours, shapes and places are an arrangement that is kept from training."""
    return unseen([Thing(c, s, 0.5, 0.5, 0.1) for c, s, _ in told], [list(QUARTERS).index(p) for *_, p in told])


def test_pictures_are_of_arrangements_of_their_split() -> None:
    for split in ("train", "held_out"):
        captions = [e for i in range(300) if (e := Scenes().example(split, i)).kind == "caption"]  # type: ignore[arg-type]
        for e in captions:
            assert isinstance(e.parts[0], ImageData)
            there = dict(seen(e.parts[0].pixels))
            assert new([(c, s, there[c]) for c, s in re.findall(r"a (\w+) (\w+)", e.answer)]) == (split == "held_out")


def truth(e: Example, told: list[tuple[str, str, str]]) -> str:
    """The answer to a question about things of these colours, shapes and places."""
    asked = question(e)
    named = [t for m in re.finditer(r"\bthe (\w+)|\bis (\w+)\?", asked) for t in told if (m[1] or m[2]) in t[:2]]
    if e.kind == "count":
        return str(len(told))
    if e.kind == "exists":
        (colour, shape), = re.findall(r"(?:a|any) (\w+) (\w+)\?", asked)
        return "yes" if any(t[:2] == (colour, shape) for t in told) else "no"
    if e.kind == "relation":
        (x, y), (u, v) = (QUARTERS[t[2]] for t in named)
        return "yes" if {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[
            re.findall("left of|right of|above|below", asked)[0]
        ] else "no"  # fmt: skip
    (thing,) = named
    return thing[("colour", "shape", "place").index(e.kind)]


def test_stories_say_what_is_asked() -> None:
    for i in range(200):
        e = Stories().example("train", i)
        told = re.findall(r"A (\w+) (\w+) is ([\w ]+)\.", str(e.parts[0]))
        assert not new(told)
        assert len({c for c, _, _ in told}) == len({s for _, s, _ in told}) == len({p for _, _, p in told}) == len(told)
        assert e.answer == f" {truth(e, told)}"
        held = Stories().example("held_out", i)
        told = re.findall(r"A (\w+) (\w+) is ([\w ]+)\.", str(held.parts[0]))
        assert new(told)
        assert held.answer == f" {truth(held, told)}"


def test_pictures_are_smooth_and_of_any_size() -> None:
    for shape in SHAPES:
        share = [
            (picture([Thing("white", shape, 0.5, 0.5, 0.3)], n)[..., 0] / 245).mean() for n in (16, 32, 128)
        ]  # fmt: skip
        assert share[:2] == pytest.approx([share[2]] * 2, rel=0.05)
    assert (picture([], 4, 9) == 9).all()


def centre(frame: np.ndarray) -> np.ndarray:
    bright = frame.astype(float).max(axis=2)
    weight = bright - bright.min()
    return np.array([(weight * np.arange(32)[None, :]).sum(), (weight * np.arange(32)[:, None]).sum()]) / weight.sum()


def test_clips_do_what_the_answer_says() -> None:
    kinds = Counter()
    for i in range(200):
        e = Clips().example("held_out" if i % 2 else "train", i)
        clip = e.parts[0]
        assert isinstance(clip, VideoData)
        kinds[e.kind] += 1
        first, last = clip.frames[0], clip.frames[-1]
        if e.kind == "way":
            x, y = centre(last) - centre(first)
            way = ("right" if x > 0 else "left") if abs(x) > abs(y) else "down" if y > 0 else "up"
            assert e.answer == f" {way}"
        elif e.kind == "growth":
            before, after = ((f.max(axis=2) > 150).sum() for f in (first, last))
            assert e.answer == (" grows" if after > 1.3 * before else " shrinks" if before > 1.3 * after else " stays")
        else:
            masks = {c: [np.abs(f.astype(int) - rgb).max(axis=2) < 3 for f in (first, last)] for c, rgb in COLOURS.items()}
            moved = [c for c, (a, b) in masks.items() if not np.array_equal(a, b)]
            assert e.answer == (f" {moved[0]}" if e.kind == "mover" else f" {len(moved)}")
            further = dict(e.more)
            numbers = [a for q, a in further.items() if q.startswith(("How many", "What number"))]
            movers = [a for q, a in further.items() if q.startswith(("What colour", "Which colour"))]
            assert numbers == [f" {len(moved)}"]
            assert movers == ([f" {moved[0]}"] if len(moved) == 1 else [])
    assert min(kinds.values()) >= 20


def test_the_first_frame_does_not_tell_the_way() -> None:
    made = [e for i in range(3000) if (e := Clips().example("train", i)).kind == "way"]
    begin = {w: [centre(e.parts[0].frames[0]) for e in made if e.answer == w] for w in (" left", " right")}
    assert np.mean(begin[" left"], axis=0) == pytest.approx(np.mean(begin[" right"], axis=0), abs=0.5)


def test_digits_are_split_and_real() -> None:
    task = Digits(size=50)
    pictures, digits, order = task._data
    assert sorted(order) == list(range(1797))
    whole = [task.example("held_out", i) for i in range(task.held_out)]
    assert Counter(e.answer for e in whole) == Counter(f" {digits[i]}" for i in order[: task.held_out])
    first = whole[0].parts[0]
    assert isinstance(first, ImageData)
    assert first.pixels[7:45:5, 7:45:5, 0] == pytest.approx(255 * pictures[order[0]], abs=0.51)  # the centres of the pixels
    trained = {task.draw(np.random.default_rng(i), "train").parts[0].pixels.tobytes() for i in range(50)}
    assert len(trained) == 50


def test_enlarging_turns_and_moves() -> None:
    x = np.arange(16.0).reshape(4, 4)
    assert enlarged(x, 4, 0.0, 1.0, np.zeros(2)) == pytest.approx(x)
    assert enlarged(x, 4, np.pi / 2, 1.0, np.zeros(2)) == pytest.approx(np.rot90(x, -1))
    moved = enlarged(x, 4, 0.0, 1.0, np.array([0.25, 0]))
    assert moved[:, 1:] == pytest.approx(x[:, :-1])
    assert not moved[:, 0].any()


def test_baselines_of_the_digits() -> None:
    found = Digits().baselines()
    assert 0.05 < found["majority"] < 0.2
    assert 0.94 < found["logistic regression"] < 0.99


class Fixed(Task):
    """Of kind a, two thirds x in training; of kind b, always y. Held out, x is as often as z."""

    name = "fixed"
    held_out = 4

    def example(self, split: Split, index: int) -> Example:
        if split == "train":
            return [Example((), "x", "a"), Example((), "x", "a"), Example((), "z", "a"), Example((), "y", "b")][index % 4]
        return [Example((), "x", "a"), Example((), "z", "a"), Example((), "y", "b"), Example((), "y", "b")][index]

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        raise NotImplementedError


def test_majority_is_by_kind_and_from_training() -> None:
    assert majority(Fixed()) == 0.75


def test_without_media() -> None:
    image, audio = ImageData(np.full((2, 2, 3), 7, np.uint8)), AudioData(np.ones(5, np.float32), 8)
    video = VideoData(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.arange(2, dtype=np.float32))
    blind = Example((image, "x", audio, video), "y", "z").blind()
    assert blind.parts[1] == "x"
    assert (blind.answer, blind.kind) == ("y", "z")
    (a, b, c) = (blind.parts[i] for i in (0, 2, 3))
    assert isinstance(a, ImageData)
    assert isinstance(b, AudioData)
    assert isinstance(c, VideoData)
    assert a.pixels.shape == (2, 2, 3)
    assert not a.pixels.any()
    assert b.wave.shape == (5,)
    assert not b.wave.any()
    assert np.array_equal(c.frames, video.frames[[0, 0]])
    assert np.array_equal(c.times, video.times)


@pytest.mark.parametrize(
    "source, shown",
    [("1 + 2", "3"), ("x = 'ab'[::-1]; x", "'ba'"), ("y = 4 > 5; print(y)", "False"), ("print('ab'.upper())", "AB")],
)
def test_results_are_pythons(source: str, shown: str) -> None:
    assert result(source) == shown


def test_code_holds_combinations_out() -> None:
    made = {s: [Code().example(s, i) for i in range(1500)] for s in ("train", "held_out")}
    assert {e.kind for e in made["train"]} >= {e.kind for e in made["held_out"]}
    bare = {s: {re.sub(r"\d+", "0", re.sub(r"'\w+'", "''", question(e))) for e in made[s]} for s in made}
    assert len(bare["held_out"]) == len(OPERATIONS)  # each in one form, which is never trained
    assert not bare["train"] & bare["held_out"]


def test_speech_keeps_voices_apart(voices: Voices) -> None:
    assert len(voices.waves["train"]) == 20
    assert len(voices.waves["held_out"]) == 5
    timbres = {s: {p.stem.split("-")[-3] for p in (ROOT / "examples" / "speech" / s).glob("*.wav")} for s in voices.waves}
    assert not timbres["train"] & timbres["held_out"]
    spectra = [np.abs(np.fft.rfft(word)) for waves in voices.waves.values() for (word, *_) in waves]
    alike = np.corrcoef(spectra) - np.eye(len(spectra))
    assert alike.max() < 0.9  # no name stands for another's voice
    clean = voices.say(np.random.default_rng(0), "held_out", WORDS.index("seven"), RATE).wave
    words = [w[WORDS.index("seven")] for w in voices.waves["held_out"]]
    assert any(np.abs(np.correlate(clean, w)).max() == pytest.approx((w * w).sum(), rel=1e-4) for w in words)


def test_voices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"train holds no voices"):
        Voices(tmp_path, RATE)
    (tmp_path / "train").mkdir()
    with wave.open(str(tmp_path / "train" / "a.wav"), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(RATE)
        f.writeframes(bytes(80))
    with pytest.raises(TaskError, match=r"a.wav is not mono, 8 bits, 8000 Hz"):
        Voices(tmp_path, RATE)


def loud(x: np.ndarray) -> int:
    """How many stretches of sound there are."""
    level = np.convolve(np.abs(x), np.ones(200) / 200, "same") > 0.25 * np.abs(x).max()
    return int((np.diff(level.astype(int), prepend=0) == 1).sum())


def test_tones_sound_as_they_are_asked_for() -> None:
    for i in range(150):
        e = Tones(RATE, RATE).example("held_out", i)
        assert isinstance(e.parts[0], AudioData)
        x = e.parts[0].wave
        at = np.flatnonzero(np.abs(x) > 1e-3)
        half = (at[0] + at[-1]) // 2

        def pitch(part: np.ndarray) -> float:
            spectrum = np.abs(np.fft.rfft(part, 32 * RATE))
            strong = spectrum > 0.5 * spectrum.max()
            return float(np.argmax(strong)) / 32

        if e.kind == "pitch":
            assert e.answer == (" high" if pitch(x) > 425 else " low")
        elif e.kind == "beeps":
            assert e.answer == f" {loud(x)}"
        else:
            ratio = pitch(x[half : at[-1]]) / pitch(x[at[0] : half])
            assert e.answer == (" rises" if ratio > 1.15 else " falls" if ratio < 0.87 else " stays")


def test_match_is_about_both(voices: Voices) -> None:
    task = Match(Digits(), voices, RATE)
    answers = Counter(task.example("held_out", i).answer for i in range(200))
    assert set(answers) == {" yes", " no"}
    assert 70 < answers[" yes"] < 130


def test_sources_are_split_by_file(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"f{i}.txt").write_text(f"line {i}\n" * 30)
    task = Sources(sorted(tmp_path.iterdir()), length=20)
    drawn = {s: {re.findall(r"line \d+", task.example(s, i).answer)[0] for i in range(300)} for s in ("train", "held_out")}
    assert not drawn["train"] & drawn["held_out"]
    assert all(len(task.example("train", i).answer) <= 20 for i in range(20))
    with pytest.raises(TaskError, match="of 1 files with text, none fell to the split"):
        Sources([tmp_path / "f0.txt"])
