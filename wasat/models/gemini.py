"""The Gemini-style model. Its home is ``wasat.frontend.models.gemini``; this is the name to import it by."""

from wasat.frontend.models.gemini import (
    MODEL_TYPE,
    PRESETS,
    Audio,
    Config,
    ConvNet,
    Gemini,
    Head,
    Text,
    Video,
    ViT,
    load,
    preset,
    save,
)

__all__ = [
    "MODEL_TYPE", "PRESETS", "Audio", "Config", "ConvNet", "Gemini", "Head", "Text", "ViT", "Video", "load", "preset", "save",
]  # fmt: skip
