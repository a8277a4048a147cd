"""A Gemini-style model: images, audio, video and text through one decoder, built from ``wasat.nn``.

    config = gemini.preset("small")
    program = gemini.Gemini(config).program()             # encode_image, encode_audio, encode_video, forward
    training = gemini.Gemini(config).training_program()   # one graph over batches of everything
    gemini.save("folder", config, trained.params, tokenizer="tokenizer.json")
"""

from .config import MODEL_TYPE, Audio, Config, ConvNet, Head, Text, Video, ViT
from .folder import load, save
from .model import Gemini
from .presets import PRESETS, preset

__all__ = [
    "MODEL_TYPE", "PRESETS", "Audio", "Config", "ConvNet", "Gemini", "Head", "Text", "ViT", "Video", "load", "preset", "save",
]  # fmt: skip
