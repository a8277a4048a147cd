"""Sizes and switches of the model: plain frozen data, checked, to and from JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wasat.frontend.fields import ConfigError, Fields, brief
from wasat.frontend.models.config import MOST_LAYERS, MOST_POSITIONS, MOST_SIZE
from wasat.frontend.nn import ACTIVATIONS

ROUNDED = "rounded"
"""What a folder says beside the configuration: the scheme that its weights were trained rounded to."""
MODEL_TYPE = "wasat_gemini"
"""``model_type`` in a folder's config.json."""

MOST = {"layers": MOST_LAYERS, "context": MOST_POSITIONS, "window": MOST_POSITIONS}
"""The largest number of a field, where it is no width."""


def _check(who: object, ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(f"{type(who).__name__}: {message}")


def _check_sizes(who: object) -> None:
    """Every int of ``who`` is positive and of a size that machines hold; every float is a finite f32."""
    for f in dataclasses.fields(who):  # type: ignore[arg-type]
        value = getattr(who, f.name)
        most = MOST.get(f.name, MOST_SIZE)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int) and not isinstance(x, bool):
                _check(who, x > 0, f"{f.name} is {brief(value)}; expected a positive number")
                _check(who, x <= most, f"{f.name} is {brief(value)}; at most {most:,} is supported")
            if isinstance(x, float):
                _check(who, abs(x) < 2.0**128, f"{f.name} is {value}")


def _check_square(who: object, tokens: int, grid: int, what: str) -> None:
    side = math.isqrt(tokens)
    _check(
        who, side * side == tokens and grid % side == 0,
        f"tokens is {tokens}: {what} has {grid}x{grid} features, averaged to a square grid whose side divides {grid}",
    )  # fmt: skip


def _check_heads(who: object, dim: int, heads: int) -> None:
    _check(who, dim % heads == 0, f"dim {dim} does not split into {heads} heads")


@dataclass(frozen=True)
class Text:
    """The decoder backbone: RMS norms, grouped-query attention with rotary positions, gated feed-forward."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    """Most positions of a row."""
    activation: str = "gelu_tanh"
    theta: float = 10_000.0
    """RoPE base of layers that see everything before."""
    rope_factor: float = 1.0
    """Positions of these layers are divided by it."""
    window: int | None = None
    """Positions that the other layers see; None: all layers see everything."""
    period: int = 6
    """With a window: every so manyth layer sees everything."""
    local_theta: float = 10_000.0
    """RoPE base of layers with a window."""
    scale: float | None = None
    """Of attention scores; None: ``head_dim ** -0.5``."""
    qk_norm: bool = True
    post_norm: bool = False
    """Norms also behind attention and feed-forward (Gemma 2 and 3)."""
    attention_softcap: float | None = None
    softcap: float | None = None
    """Of the logits."""
    tied: bool = True
    """The head is the embedding."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check(self, self.heads % self.kv_heads == 0, f"{self.heads} heads do not share {self.kv_heads} key/value heads")
        _check(self, self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary positions need an even number")
        _check(self, self.activation in ACTIVATIONS, f"activation is {self.activation!r}; there are {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class _Picture:
    size: int
    """Images are resized to size x size pixels."""
    tokens: int
    """Rows per image: the features' grid averaged to a square."""


@dataclass(frozen=True)
class ViT(_Picture):
    """A vision transformer (arXiv:2010.11929) as in SigLIP (arXiv:2303.15343): patches, bidirectional pre-norm layers."""

    patch: int
    dim: int
    layers: int
    heads: int
    hidden: int
    positions: Literal["learned", "rope"] = "learned"
    """A table, or rotary: half of each head turns with the row, half with the column."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    mean: float = 0.5
    std: float = 0.5
    """Pixels in [0, 1] are normalized to ``(x - mean) / std``."""
    eps: float = 1e-6
    kind: Literal["vit"] = "vit"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_heads(self, self.dim, self.heads)
        _check(self, self.size % self.patch == 0, f"size {self.size} is not a multiple of patch {self.patch}")
        if self.positions == "rope":
            _check(self, self.dim // self.heads % 4 == 0, f"rope needs heads of a multiple of 4, not {self.dim // self.heads}")
        _check_square(self, self.tokens, self.grid, "an image")

    @property
    def grid(self) -> int:
        """Features along a side."""
        return self.size // self.patch


@dataclass(frozen=True)
class ConvNet(_Picture):
    """Stages that halve the image (3x3 convolution, stride 2) and refine it (ConvNeXt blocks, arXiv:2201.03545)."""

    channels: tuple[int, ...]
    """Of each stage."""
    blocks: tuple[int, ...]
    """In each stage."""
    kernel: int = 5
    """Of the depthwise convolutions."""
    expansion: int = 4
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    mean: float = 0.5
    std: float = 0.5
    eps: float = 1e-6
    kind: Literal["conv"] = "conv"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check(self, bool(self.channels) and min(self.channels) > 0, f"channels is {self.channels}; expected positive numbers")
        _check(
            self, len(self.blocks) == len(self.channels) and min(self.blocks) >= 0,
            f"blocks is {self.blocks}; expected a number for each of {len(self.channels)} stages",
        )  # fmt: skip
        _check(self, self.kernel % 2 == 1, f"kernel is {self.kernel}; it must be odd")
        _check(self, self.size % 2 ** len(self.channels) == 0, f"size {self.size} cannot be halved {len(self.channels)} times")
        _check_square(self, self.tokens, self.grid, "an image")

    @property
    def dim(self) -> int:
        """Features of the last stage."""
        return self.channels[-1]

    @property
    def grid(self) -> int:
        """Features along a side."""
        return self.size // 2 ** len(self.channels)


@dataclass(frozen=True)
class Audio:
    """Log-mel frames, two convolutions, bidirectional pre-norm layers (as in Whisper, arXiv:2212.04356)."""

    seconds: float
    """Longer audio is cut off, shorter is followed by silence."""
    mels: int
    dim: int
    layers: int
    heads: int
    hidden: int
    rate: int = 16_000
    """Samples per second."""
    window: int = 400
    """Samples of a frame."""
    hop: int = 160
    """Samples between frames."""
    strides: tuple[int, int] = (2, 2)
    """Of the convolutions."""
    pool: int = 1
    """Features that are averaged to one row."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_heads(self, self.dim, self.heads)
        _check(self, len(self.strides) == 2 and min(self.strides) > 0, f"strides is {self.strides}; expected two numbers")
        _check(self, self.samples <= MOST_POSITIONS, f"{self.seconds} seconds are more than {MOST_POSITIONS:,} samples")
        _check(self, self.samples >= self.window, f"{self.samples} samples are less than a window of {self.window}")
        _check(
            self, self.features % self.pool == 0, f"pool is {self.pool}, which does not divide {self.features} features"
        )

    @property
    def samples(self) -> int:
        """That the encoder hears."""
        return round(self.seconds * self.rate)

    @property
    def features(self) -> int:
        """Positions behind the convolutions."""
        n = self.samples // self.hop
        for stride in self.strides:
            n = -(-n // stride)
        return n

    @property
    def tokens(self) -> int:
        """Rows per clip."""
        return self.features // self.pool


@dataclass(frozen=True)
class Video:
    """Frames seen by the image encoder, with their times; where there are layers, each place then attends over the frames
    (a factorised encoder, ViViT, arXiv:2103.15691).
    """

    frames: int
    """Evenly chosen from those given."""
    tokens: int
    """Rows per frame."""
    layers: int | None = None
    """Over time; None: frames meet in the backbone alone."""
    heads: int | None = None
    hidden: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        given = [n is not None for n in (self.layers, self.heads, self.hidden)]
        _check(self, all(given) or not any(given), "layers, heads and hidden are given together or not at all")


@dataclass(frozen=True)
class Head:
    """A linear classifier over a mean of rows (image, audio, video), or over the backbone's last token (text)."""

    name: str
    classes: int
    of: Literal["image", "audio", "video", "text"]

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check(self, self.name.isidentifier(), f"name is {self.name!r}; expected letters, digits and _")


@dataclass(frozen=True)
class Config:
    """The whole model. A modality that is None is absent."""

    text: Text
    vision: ViT | ConvNet | None = None
    audio: Audio | None = None
    video: Video | None = None
    cross_every: int | None = None
    """A gated cross-attention block before every so manyth layer."""
    heads: tuple[Head, ...] = ()
    name: str = "gemini"
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def __post_init__(self) -> None:
        if self.cross_every is not None:
            layers = self.text.layers
            _check(self, 0 < self.cross_every <= layers, f"cross_every is {self.cross_every}; expected 1 to {layers}")
            _check(self, bool(self.modalities), "cross_every needs an encoder to attend to: vision or audio")
        if self.video is not None:
            if self.vision is None:
                raise ConfigError("Config: video needs vision, whose encoder sees the frames")
            _check_square(self.video, self.video.tokens, self.vision.grid, "a frame")
            if self.video.heads is not None:
                _check_heads(self.video, self.vision.dim, self.video.heads)
        names = [h.name for h in self.heads]
        _check(self, len(set(names)) == len(names), f"two heads have one name: {', '.join(names)}")
        for h in self.heads:
            _check(self, h.of == "text" or h.of in self.modalities, f"head {h.name} is of {h.of}, which the model lacks")
        for token in (self.bos, self.pad, *self.eos):
            _check(self, token is None or 0 <= token < self.text.vocab, f"token {token} is outside the vocabulary")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those beside text, in the order of their rows in a training batch: image, audio, video."""
        parts = {"image": self.vision, "audio": self.audio, "video": self.video}
        return tuple(name for name, part in parts.items() if part is not None)

    def rows(self, modality: str) -> int:
        """How many rows of media one image, one clip of audio, or one video is; 0 for a modality that is absent."""
        if modality == "video":
            return self.video.frames * self.video.tokens if self.video is not None else 0
        part = self.vision if modality == "image" else self.audio
        return part.tokens if part is not None else 0

    def to_json(self) -> dict[str, Any]:
        """Every field, and ``model_type``."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "config") -> Config:
        """The inverse of :meth:`to_json`; fields with defaults may be left out.

        Raises ConfigError, naming ``where`` and the field, for a field that is unknown, missing or of another type.
        """
        fields = Fields({k: v for k, v in data.items() if k != ROUNDED}, where)
        fields.refuse("model_type", MODEL_TYPE, f"it is not {MODEL_TYPE!r}")
        config: Config = fields.made(Config)
        return config
