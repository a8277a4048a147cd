"""Ready-made sizes: two that train here, and the published ones of Gemma 3 (arXiv:2503.19786).

Gemini's own sizes are not public. Gemma 3, by the same makers, has a published decoder and a published image encoder
(SigLIP-So400m, arXiv:2303.15343, at 896 pixels and 256 rows an image); the audio encoder has the sizes of Whisper large-v3
(arXiv:2212.04356), at 375 rows for 30 s. The combination is ours, and there are no weights for it.
"""

from __future__ import annotations

from collections.abc import Callable

from wasat.frontend.fields import ConfigError

from .config import Audio, Config, Text, Video, ViT


def _tiny() -> Config:
    """For tests: 40,000 parameters."""
    return Config(
        Text(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=64, context=128),
        ViT(size=16, tokens=4, patch=4, dim=32, layers=1, heads=4, hidden=48),
        Audio(seconds=0.1, mels=16, dim=32, layers=1, heads=4, hidden=48, rate=8000, window=128, hop=80),
        Video(frames=4, tokens=1),
        name="gemini-tiny",
    )


def _small() -> Config:
    """3.0 million parameters: a size to train on a few cores."""
    return Config(
        Text(vocab=1024, dim=160, layers=6, heads=4, kv_heads=2, head_dim=40, hidden=432, context=256, activation="silu"),
        ViT(size=48, tokens=9, patch=8, dim=96, layers=4, heads=4, hidden=384),
        Audio(seconds=1.0, mels=40, dim=96, layers=3, heads=4, hidden=384),
        Video(frames=8, tokens=4),
        name="gemini-small",
    )


def _gemma3(
    name: str, dim: int, layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int, scale: float
) -> Callable[[], Config]:
    def config() -> Config:
        return Config(
            Text(
                vocab=262_144, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden,
                context=131_072, theta=1e6, rope_factor=8.0, window=1024, period=6, local_theta=1e4, scale=scale**-0.5,
                post_norm=True,
            ),
            ViT(size=896, tokens=256, patch=14, dim=1152, layers=27, heads=16, hidden=4304),
            Audio(seconds=30.0, mels=128, dim=1280, layers=32, heads=20, hidden=5120, strides=(1, 2), pool=4),
            Video(frames=64, tokens=64),
            name=name,
        )  # fmt: skip

    return config


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": _tiny,
    "small": _small,
    "4b": _gemma3("gemini-4b", 2560, 34, 8, 4, 256, 10_240, 256.0),
    "12b": _gemma3("gemini-12b", 3840, 48, 16, 8, 256, 15_360, 256.0),
    "27b": _gemma3("gemini-27b", 5376, 62, 32, 16, 128, 21_504, 168.0),
}


def preset(name: str) -> Config:
    """The configuration called ``name``. Raises ConfigError for a name there is none of."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
