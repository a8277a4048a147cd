"""Makes examples/speech: twenty words in 25 voices of espeak-ng, one WAV a voice (8 bits, 8000 Hz, 0.7 s a word).

    apt-get install espeak-ng        # the files in the repository: 1.51
    python examples/make_speech.py

Voices that are held out share neither timbre nor pitch nor speed with those of training; one has an accent of its own, too.
"""

import io
import subprocess
import wave
from pathlib import Path

import numpy as np

from wasat.recipes.tasks.speech import WORDS

RATE, SAMPLES = 8000, 5600
TRAIN = [
    ("en-us", "m1", 50, 165), ("en-us", "m2", 40, 180), ("en-us", "f1", 55, 160), ("en-us", "f2", 65, 175),
    ("en-us", "klatt", 45, 170), ("en-us", "Andy", 50, 155), ("en-gb", "m3", 45, 160), ("en-gb", "m4", 60, 170),
    ("en-gb", "f4", 50, 165), ("en-gb", "f5", 70, 180), ("en-gb", "klatt2", 55, 160), ("en-gb", "Annie", 60, 170),
    ("en-gb-x-rp", "m5", 35, 175), ("en-gb-x-rp", "f2", 45, 155), ("en-gb-x-rp", "steph", 60, 165),
    ("en-gb-x-gbclan", "m7", 50, 160), ("en-gb-x-gbclan", "f1", 75, 170), ("en-gb-x-gbcwmd", "adam", 40, 160),
    ("en-gb-x-gbcwmd", "belinda", 55, 175), ("en-029", "edward", 50, 165),
]  # fmt: skip
HELD_OUT = [
    ("en-us", "f3", 52, 168), ("en-us", "m6", 47, 162), ("en-gb", "linda", 58, 172), ("en-gb-x-rp", "Michael", 43, 158),
    ("en-gb-scotland", "m8", 53, 167),
]  # fmt: skip


LANGUAGES = {"en-gb": "gmw/en"}
"""By accent, what espeak-ng calls it where it is not that: of `en-gb+f4` it drops the timbre, without a word."""


def spoken(word: str, voice: tuple[str, str, int, int]) -> np.ndarray:
    """f64[SAMPLES]: a word without the silence around it, at full loudness."""
    accent, timbre, pitch, speed = voice
    name = f"{LANGUAGES.get(accent, accent)}+{timbre}"
    command = ["espeak-ng", "-v", name, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(data)) as f:
        rate = f.getframerate()
        samples = np.frombuffer(data[44:], np.int16) / 32768  # espeak-ng writes the length of a stream: none
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    size = int(len(samples) * RATE / rate)
    samples = np.fft.irfft(np.fft.rfft(samples)[: size // 2 + 1], size) * (size / len(samples))  # nothing above RATE / 2
    made = np.zeros(SAMPLES)
    made[: min(size, SAMPLES)] = samples[:SAMPLES]
    return made / np.abs(made).max()


def main() -> None:
    folder = Path(__file__).parent / "speech"
    for split, voices in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for voice in voices:
            words = np.concatenate([spoken(word, voice) for word in WORDS])
            accent, timbre, *how = voice
            if np.array_equal(words[:SAMPLES], spoken(WORDS[0], (accent, "none", *how))):
                raise SystemExit(f"espeak-ng has no timbre {timbre} for {accent}: it speaks as if none were named")
            with wave.open(str(folder / split / ("-".join(map(str, voice)) + ".wav")), "wb") as f:
                f.setnchannels(1)
                f.setsampwidth(1)
                f.setframerate(RATE)
                f.writeframes(np.rint(127 * words + 128).astype(np.uint8).tobytes())


if __name__ == "__main__":
    main()
