"""Makes examples/media: a digit, a scene, a spoken word and a clip of the held-out splits, as files.

    pip install 'wasat[train,media]'
    python examples/make_media.py

Scene and clip are drawn at three times the size that the small model sees; it resizes them itself.
"""

import wave
from pathlib import Path

import numpy as np
from PIL import Image
from wasat.training.tasks import AudioData, Clips, Digits, Example, ImageData, Scenes, Speech, Task, VideoData
from wasat.training.tasks.speech import Voices

HERE = Path(__file__).parent
RATE = 8000


def first(task: Task, answer: str) -> Example:
    """The first held-out example with this answer."""
    return next(e for e in map(lambda i: task.example("held_out", i), range(10_000)) if e.answer == answer)


def main() -> None:
    folder = HERE / "media"
    folder.mkdir(exist_ok=True)
    tasks: dict[str, tuple[Task, str]] = {
        "digit.png": (Digits(), " 7"), "scene.png": (Scenes(96), " a yellow triangle, a red cross"),
        "word.wav": (Speech(Voices(HERE / "speech", RATE), RATE), " seven"), "clip.gif": (Clips(96), " left"),
    }  # fmt: skip
    for name, (task, answer) in tasks.items():
        example = first(task, answer)
        medium = example.parts[0]
        if isinstance(medium, ImageData):
            Image.fromarray(medium.pixels).save(folder / name)
        elif isinstance(medium, AudioData):
            with wave.open(str(folder / name), "wb") as f:
                f.setnchannels(1)
                f.setsampwidth(2)
                f.setframerate(RATE)
                f.writeframes(np.rint(32767 * medium.wave).astype("<i2").tobytes())
        elif isinstance(medium, VideoData):
            frames = [Image.fromarray(x) for x in medium.frames]
            step = round(1000 * float(medium.times[1] - medium.times[0]))
            frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=step, loop=0)
        print(f"{name}: {example.parts[1]}{example.answer}")


if __name__ == "__main__":
    main()
