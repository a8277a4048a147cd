"""Makes examples/media: files and questions for `wasat demo`, from the held-out splits of the tasks of examples/gemini.toml.

    pip install 'wasat[train,media]'
    python examples/make_media.py [FOLDER]

Of each kind of question it is the first one of its held-out split, for a description the first of three things; none was
chosen for how it is answered. Pictures and clips are drawn larger than the model sees them: it resizes them itself.
"""

import json
import sys
import tomllib
import wave
from itertools import count
from pathlib import Path

import av
import numpy as np
from PIL import Image

from wasat.recipes.tasks import AudioData, Clips, Code, Digits, Example, ImageData, Match, Scenes, Speech, Task, VideoData
from wasat.recipes.tasks.speech import Voices

HERE = Path(__file__).parent
RECIPE = tomllib.loads((HERE / "gemini.toml").read_text())
SEED, RATE = RECIPE["seed"], RECIPE["model"]["audio"]["rate"]
SIZE = 192
"""Of pictures and clips, in pixels."""


def first(task: Task, kind: str, things: int = 1) -> Example:
    """The first held-out example of a kind, whose answer tells of so many things."""
    examples = (task.example("held_out", i) for i in count())
    return next(e for e in examples if e.kind == kind and len(e.answer.split(",")) == things)


def write(part: ImageData | AudioData | VideoData, path: Path) -> None:
    if isinstance(part, ImageData):
        Image.fromarray(part.pixels).save(path, optimize=True)
    elif isinstance(part, AudioData):
        with wave.open(str(path), "wb") as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(part.rate)
            f.writeframes(np.rint(32767 * part.wave).astype("<i2").tobytes())
    elif path.suffix == ".gif":
        frames = [Image.fromarray(x) for x in part.frames]
        delay = 10 * round(100 * float(part.times[1]))  # milliseconds; GIF counts in hundredths of a second
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=delay, loop=0)
    else:
        rate = round(1 / float(part.times[1]))
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate, options={"crf": "18"})
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"  # the one that every browser shows
            for x in part.frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(x)))
            file.mux(stream.encode())


def main(folder: Path) -> None:
    samples = int(RECIPE["model"]["audio"]["seconds"] * RATE)
    frames = RECIPE["model"]["video"]["frames"]
    digits, voices = Digits(SIZE, SEED), Voices(HERE / "speech", RATE)
    scenes, clips = Scenes(SIZE, SEED), Clips(SIZE, frames, SEED)
    wanted = [
        ("A picture", first(scenes, "relation"), ("scene.png",)),
        ("A picture to describe", first(scenes, "caption", things=3), ("picture.png",)),
        ("A handwritten digit", first(digits, "digit"), ("digit.png",)),
        ("A spoken word", first(Speech(voices, samples, SEED), "word"), ("word.wav",)),
        ("Seen and heard", first(Match(digits, voices, samples, SEED), "match"), ("seen.png", "heard.wav")),
        ("A clip", first(clips, "way"), ("clip.gif",)),
        ("A clip of two things", first(clips, "mover"), ("mover.mp4",)),
        ("A line of code", first(Code(SEED), "max"), ()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    questions = []
    for title, example, files in wanted:
        *media, question = example.parts
        assert isinstance(question, str)
        for part, name in zip(media, files, strict=True):
            assert not isinstance(part, str)
            write(part, folder / name)
        questions.append({"title": title, "media": files, "question": question, "answer": example.answer.strip()})
    (folder / "questions.json").write_text(json.dumps(questions, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE / "media")
