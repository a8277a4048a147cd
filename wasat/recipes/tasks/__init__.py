"""Tasks that a multimodal model learns from: examples that are generated, or real and small, split so that accuracy means
generalisation.

Every task makes example ``index`` of a split from its seed alone: the same each time, in any order. What is asked of the
held-out split never occurs in training: other pictures, voices, combinations, and other words of the question, though
each word on its own occurs.
"""

from wasat.recipes.tasks.base import AudioData, Example, ImageData, Split, Task, TaskError, VideoData, majority
from wasat.recipes.tasks.clips import Clips
from wasat.recipes.tasks.code import Code, Sources
from wasat.recipes.tasks.digits import Digits
from wasat.recipes.tasks.scenes import Scenes, Stories
from wasat.recipes.tasks.speech import Match, Speech, Tones

__all__ = [
    "AudioData", "Clips", "Code", "Digits", "Example", "ImageData", "Match", "Scenes", "Sources", "Speech", "Split", "Stories",
    "Task", "TaskError", "Tones", "VideoData", "majority",
]  # fmt: skip
