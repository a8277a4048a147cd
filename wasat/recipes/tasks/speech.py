"""Sounds: words that espeak-ng spoke in several voices, tones, and digits that are seen and heard."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from wasat.recipes.tasks.base import AudioData, Example, ImageData, Split, Task, TaskError, wording
from wasat.recipes.tasks.digits import Digits

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "yes", "no", "stop", "go", "up", "down", "left", "right", "on", "off",
)  # fmt: skip


class Voices:
    """WAVs of a folder, ``train/*.wav`` and ``held_out/*.wav``: each is one voice that says WORDS in equal shares of time."""

    def __init__(self, folder: Path, rate: int) -> None:
        """Raises TaskError where there are none, or their sampling rate is not ``rate``."""
        self.rate = rate
        self.waves = {split: self._read(folder / split) for split in ("train", "held_out")}

    def _read(self, folder: Path) -> list[np.ndarray]:
        found = []
        for path in sorted(folder.glob("*.wav")):
            with wave.open(str(path), "rb") as f:
                if (f.getnchannels(), f.getsampwidth(), f.getframerate()) != (1, 1, self.rate):
                    raise TaskError(f"{path} is not mono, 8 bits, {self.rate} Hz: make it again, or set the model's audio rate")
                samples = np.frombuffer(f.readframes(f.getnframes()), np.uint8)
            found.append(((samples.astype(np.float32) - 128) / 128).reshape(len(WORDS), -1))
        if not found:
            raise TaskError(f"{folder} holds no voices (*.wav)")
        return found

    def say(self, rng: np.random.Generator, split: Split, word: int, samples: int) -> AudioData:
        """f32[samples]: a word by one of a split's voices at any time, in training also faster, slower, softer and noisy."""
        voices = self.waves[split]
        spoken = voices[rng.integers(len(voices))][word]
        if split == "train":
            speed = rng.uniform(0.85, 1.2)
            spoken = np.interp(np.arange(0, len(spoken) - 1, speed), np.arange(len(spoken)), spoken)
        spoken = spoken[:samples]
        made = np.zeros(samples)
        start = int(rng.integers(samples - len(spoken) + 1))
        made[start : start + len(spoken)] = spoken
        return AudioData(_recorded(rng, made, split), self.rate)


def _recorded(rng: np.random.Generator, wave: np.ndarray, split: Split) -> np.ndarray:
    """f32, in [-1, 1]; in training of some loudness, with some noise."""
    if split == "train":
        wave = rng.uniform(0.3, 1.0) * wave + 10 ** rng.uniform(-4, -1.8) * rng.standard_normal(len(wave))
    return np.clip(wave, -1, 1).astype(np.float32)


class Speech(Task):
    """Which of twenty words is said. Held out: voices."""

    name = "speech"

    def __init__(self, voices: Voices, samples: int, seed: int = 0) -> None:
        """``samples``: of each sound."""
        super().__init__(seed)
        self.voices, self.samples = voices, samples

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        word = int(rng.integers(len(WORDS)))
        asked = wording(rng, split, ("Which word", "What word"), ("is this?", "do you hear?"))
        return Example((self.voices.say(rng, split, word, self.samples), asked), f" {WORDS[word]}", "word")


class Match(Task):
    """A handwritten digit, then a spoken one: are they the same? Held out: digits and voices."""

    name = "match"

    def __init__(self, digits: Digits, voices: Voices, samples: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.digits, self.voices, self.samples = digits, voices, samples

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        seen = self.digits.draw(rng, split)
        digit = int(seen.answer)
        same = bool(rng.random() < 0.5)
        said = digit if same else (digit + int(rng.integers(1, 10))) % 10
        image = seen.parts[0]
        assert isinstance(image, ImageData)
        asked = wording(rng, split, ("Is that the same", "Is it the same"), ("digit?", "number?"))
        return Example((image, self.voices.say(rng, split, said, self.samples), asked), " yes" if same else " no", "match")


class Tones(Task):
    """How high a tone is, where it goes, how often it sounds. Held out: a timbre."""

    name = "tones"
    timbres: tuple[tuple[float, ...], ...] = ((1.0,), (1.0, 0.5, 0.33, 0.25), (1.0, 0.0, 0.33, 0.0, 0.2))
    """Strengths of the harmonics in training: sine, saw tooth, square."""
    held_out_timbre = (1.0, 0.6, 0.0, 0.3)

    def __init__(self, rate: int, samples: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.rate, self.samples = rate, samples

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        kind = ("pitch", "glide", "beeps")[rng.integers(3)]
        low = rng.uniform(200, 300)
        first = last = low if rng.random() < 0.5 else rng.uniform(550, 800)
        count = 1
        if kind == "pitch":
            asked = wording(rng, split, ("Is the tone", "Is the sound"), ("high or low?", "a high or a low one?"))
            answer = " low" if first == low else " high"
        elif kind == "glide":
            ways = {" rises": 2.0, " falls": 0.5, " stays": 1.0}
            answer = str(rng.choice(list(ways)))
            last = first * ways[answer]
            asked = wording(rng, split, ("Does the tone", "Does the sound"), ("rise or fall?", "go up or down?"))
        else:
            count = int(rng.integers(1, 5))
            answer = f" {count}"
            asked = wording(rng, split, ("How many tones", "How many beeps"), ("are there?", "do you hear?"))
        return Example((AudioData(self._sound(rng, split, first, last, count), self.rate), asked), answer, kind)

    def _sound(self, rng: np.random.Generator, split: Split, first: float, last: float, count: int) -> np.ndarray:
        """``count`` tones of ``first`` Hz that end at ``last`` Hz, one after the other."""
        timbre = self.held_out_timbre if split == "held_out" else self.timbres[rng.integers(len(self.timbres))]
        made = np.zeros(self.samples)
        slot = self.samples // (4 if count > 1 else 1)
        length = int(slot * rng.uniform(0.5, 0.7))
        start = int(rng.integers(self.samples - (count - 1) * slot - length + 1))
        t = np.arange(length)
        phase = 2 * np.pi * np.cumsum(first * (last / first) ** (t / length)) / self.rate
        tone = sum(a * np.sin(k * phase) for k, a in enumerate(timbre, 1)) * np.minimum(1, np.minimum(t, t[::-1]) / 100)
        for i in range(count):
            made[start + i * slot : start + i * slot + length] = 0.5 * tone
        return _recorded(rng, made, split)
