"""The model: encoders into one space, one stream of tokens through one decoder. Serving and training trace the same module."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from wasat.frontend import nn
from wasat.frontend.fields import ConfigError
from wasat.ir import Encoder, Generation, Media, Program
from wasat.ir import Head as HeadEntry

from .backbone import Backbone
from .config import Config, Head, ViT
from .encoders import AudioEncoder, ConvEncoder, TimeEncoder, ViTEncoder, pooled


class Projection(nn.Module):
    """Features f32[..., features] -> rows f32[..., dim] in the backbone's space."""

    def __init__(self, features: int, dim: int, eps: float) -> None:
        self.norm = nn.RMSNorm(features, eps)
        self.linear = nn.Linear(features, dim)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.linear(self.norm(x))


class Gemini(nn.Module):
    """A decoder over text and the rows of images, audio and video, interleaved in any order.

    One stream of tokens i64[b, s]: ids below ``vocab`` are text, ``vocab + r`` is row r of media f32[m, dim], the encoders'
    outputs. The real Gemini's sizes are not public; the presets of billions have the published ones of Gemma 3.
    """

    def __init__(self, config: Config) -> None:
        text = config.text
        self.config = config
        self.embedding = nn.Embedding(text.vocab, text.dim, std=text.dim**-0.5)  # as large as media after its scaling
        self.backbone = Backbone(text, config.cross_every)
        self.head = None if text.tied else nn.Linear(text.dim, text.vocab)
        if config.vision is not None:
            self.vision = ViTEncoder(config.vision) if isinstance(config.vision, ViT) else ConvEncoder(config.vision)
            self.image_projection = Projection(config.vision.dim, text.dim, text.eps)
            if config.video is not None:
                self.clip = config.video
                self.time = TimeEncoder(config.video, config.vision.dim, config.vision.eps)
                self.video_projection = Projection(config.vision.dim, text.dim, text.eps)
        if config.audio is not None:
            self.audio = AudioEncoder(config.audio)
            self.audio_projection = Projection(config.audio.dim, text.dim, text.eps)
        self.classifiers = {h.name: nn.Linear(text.dim, h.classes, bias=True) for h in config.heads}

    # -- encoders ----------------------------------------------------------------------------------------------------------
    def _features(self, pixels: nn.Tensor) -> nn.Tensor:
        """u8 or f32[n, size, size, 3] in [0, 255] -> f32[n, grid, grid, features]."""
        c = self.vision.config
        return self.vision((pixels.cast("f32") / 255.0 - c.mean) / c.std)

    def _images(self, pixels: nn.Tensor) -> nn.Tensor:
        """[n, size, size, 3] -> rows f32[n, tokens, dim]."""
        return self.image_projection(pooled(self._features(pixels), self.vision.config.tokens))

    def _audios(self, waves: nn.Tensor) -> nn.Tensor:
        """f32[n, samples] -> rows f32[n, tokens, dim]."""
        return self.audio_projection(self.audio(waves))

    def _videos(self, frames: nn.Tensor, times: nn.Tensor) -> nn.Tensor:
        """[n, frames, size, size, 3] and f32[n, frames] in seconds -> rows f32[n, frames * tokens, dim]."""
        n, count = frames.shape[:2]
        size, tokens, width = self.vision.config.size, self.clip.tokens, self.vision.config.dim
        x = pooled(self._features(frames.reshape(n * count, size, size, 3)), tokens).reshape(n, count, tokens, width)
        x = self.time(x, times - times[:, :1])  # of the clip's first frame is 0
        return self.video_projection(x).reshape(n, count * tokens, self.config.text.dim)

    def _resized(self, pixels: nn.Tensor) -> nn.Tensor:
        """u8[n, h, w, 3] -> f32[n, size, size, 3] in [0, 255]."""
        c = self.vision.config
        x = nn.resize(pixels, (c.size, c.size), method=c.resize)
        return x if c.resize == "bilinear" else nn.minimum(nn.maximum(x, 0.0), 255.0)

    def encode_image(self, image: nn.Tensor) -> nn.Tensor:
        """u8[h, w, 3] -> rows f32[tokens, dim]."""
        return self._images(self._resized(image[None]))[0]

    def encode_audio(self, audio: nn.Tensor) -> nn.Tensor:
        """f32[n] in [-1, 1], cut off or followed by silence -> rows f32[tokens, dim]."""
        n, at = audio.shape[0], nn.arange(self.audio.config.samples)
        fitted = nn.where(at < n, nn.gather(audio, nn.minimum(at, n - 1)), 0.0)
        return self._audios(fitted[None])[0]

    def encode_video(self, frames: nn.Tensor, times: nn.Tensor) -> nn.Tensor:
        """u8[n, h, w, 3] at times f32[n] in seconds -> rows f32[frames * tokens, dim]."""
        chosen, when = nn.sample_frames(frames, times, self.clip.frames)
        return self._videos(self._resized(chosen)[None], when[None])[0]

    # -- the decoder -------------------------------------------------------------------------------------------------------
    def _hidden(self, tokens: nn.Tensor, media: nn.Tensor | None = None, seen: nn.Tensor | None = None) -> nn.Tensor:
        vocab, dim = self.config.text.vocab, self.config.text.dim
        if media is None:
            return self.backbone(self.embedding(tokens) * dim**0.5)
        last = media.shape[0] - 1
        x = self.embedding(nn.minimum(tokens, vocab - 1)) * dim**0.5
        rows = nn.gather(media, nn.minimum(nn.maximum(tokens - vocab, 0), last))
        x = nn.where((tokens >= vocab)[..., None], rows, x)
        if seen is None:
            return self.backbone(x)
        memory = nn.gather(media, nn.minimum(nn.maximum(seen, 0), last))
        return self.backbone(x, (memory, seen >= 0))

    def _logits(self, x: nn.Tensor) -> nn.Tensor:
        logits = nn.linear(x, self.embedding.weight, name="head") if self.head is None else self.head(x)
        cap = self.config.text.softcap
        return logits if cap is None else nn.tanh(logits / cap) * cap

    def forward(self, tokens: nn.Tensor, media: nn.Tensor | None = None, seen: nn.Tensor | None = None) -> nn.Tensor:
        """tokens i64[b, s], media f32[m, dim], seen i64[b, t] -> logits f32[b, s, vocab]."""
        return self._logits(self._hidden(tokens, media, seen))

    def classify(self, head: Head, **inputs: nn.Tensor) -> nn.Tensor:
        """Logits f32[classes] (of text f32[b, classes]) of ``head``, from what its encoder or ``forward`` takes."""
        if head.of == "text":
            last = inputs.pop("last")
            x = _row(self._hidden(**inputs), last)
        else:
            x = getattr(self, f"encode_{head.of}")(**inputs).mean(axis=0)
        return self.classifiers[head.name](x)

    def learn(self, **inputs: nn.Tensor) -> dict[str, nn.Tensor]:
        """What the training graph computes; see :meth:`training_program`."""
        dim = self.config.text.dim
        rows: dict[str, nn.Tensor] = {}
        if "images" in inputs:
            rows["image"] = self._images(inputs["images"])
        if "audio" in inputs:
            rows["audio"] = self._audios(inputs["audio"])
        if "videos" in inputs:
            rows["video"] = self._videos(inputs["videos"], inputs["times"])
        media = nn.concat([x.reshape(-1, dim) for x in rows.values()], axis=0) if rows else None
        x = self._hidden(inputs["tokens"], media, inputs.get("seen") if rows else None)
        out = {"logits": self._logits(x)}
        for h in self.config.heads:
            if h.of == "text":
                out[h.name] = self.classifiers[h.name](_row(x, inputs["last"]))
            elif h.of in rows:
                out[h.name] = self.classifiers[h.name](rows[h.of].mean(axis=1))
        return out

    # -- programs ----------------------------------------------------------------------------------------------------------
    def program(self, seed: int = 0) -> Program:
        """The serving program; its parameters are random, fixed by ``seed``, until replaced.

        Graphs: ``encode_image(image u8[h, w, 3])``, ``encode_audio(audio f32[n])``, ``encode_video(frames u8[n, h, w, 3],
        times f32[n])`` -> ``rows f32[t, dim]``; ``forward(tokens i64[b, s], media f32[m, dim])`` -> ``logits f32[b, s,
        vocab]``, m >= 1 (zeros where there is no media); with cross-attention also ``seen i64[b, t]``: the media rows that
        each batch row attends to, -1 for none; ``classify_<head>``: the encoder's inputs, or forward's and ``last i64[b]``
        (the position to read), -> ``logits``. A text-only model has ``forward(tokens)``.

        ``interface.media`` says of each modality its entry and what that needs, ``interface.heads`` of each head its entry and
        what it is of.
        """
        c = self.config
        signatures = {
            "image": {"image": "u8[h, w, 3]"}, "audio": {"audio": "f32[n]"},
            "video": {"frames": "u8[n, h, w, 3]", "times": "f32[n]"}, "text": self._stream(),
        }  # fmt: skip
        program = nn.trace(self, signatures["text"], method="forward", outputs=["logits"], seed=seed)
        for kind in c.modalities:
            entry = f"encode_{kind}"
            _add(program, nn.trace(self, signatures[kind], entry, method=entry, outputs=["rows"], seed=seed))
        for h in c.heads:
            taken = {**signatures[h.of], **({"last": "i64[b]"} if h.of == "text" else {})}
            method = functools.partial(self.classify, h)
            _add(program, nn.trace(self, taken, f"classify_{h.name}", method=method, outputs=["logits"], seed=seed))
        program.declare(
            name=c.name, context=c.text.context, vocab=c.text.vocab, generation=Generation(c.bos, tuple(c.eos), c.pad),
            media=self._media() if c.modalities else None,
            heads=tuple(HeadEntry(h.name, f"classify_{h.name}", h.of) for h in c.heads),
        )  # fmt: skip
        return program

    def training_program(self, modalities: Sequence[str] | None = None, seed: int = 0) -> Program:
        """The program to train: one graph ``forward``, of the same parameters, from batches of all modalities at once.

        Inputs: ``tokens i64[b, s]``, and for each of ``modalities`` (default: all that the model has) ``images u8[i, size,
        size, 3]``, ``audio f32[a, samples]``, ``videos u8[v, frames, size, size, 3]`` with ``times f32[v, frames]``; ``seen``
        and ``last`` as in :meth:`program`. Media rows are those of all images, then all audio, then all videos. Outputs:
        ``logits f32[b, s, vocab]``, and each head's ``f32[n, classes]``.

        Raises ConfigError for a modality that the model lacks.
        """
        c = self.config
        given = c.modalities if modalities is None else tuple(k for k in c.modalities if k in modalities)
        if lacking := sorted({*(modalities or ())} - {*c.modalities}):
            raise ConfigError(f"the model has no {', '.join(lacking)}; it has {', '.join(c.modalities) or 'text only'}")
        inputs = {"tokens": "i64[b, s]"}
        if c.vision is not None:
            picture = f"{c.vision.size}, {c.vision.size}, 3]"
            if "image" in given:
                inputs["images"] = f"u8[i, {picture}"
            if c.video is not None and "video" in given:
                inputs |= {"videos": f"u8[v, {c.video.frames}, {picture}", "times": f"f32[v, {c.video.frames}]"}
        if c.audio is not None and "audio" in given:
            inputs["audio"] = f"f32[a, {c.audio.samples}]"
        if c.cross_every and given:
            inputs["seen"] = "i64[b, t]"
        if any(h.of == "text" for h in c.heads):
            inputs["last"] = "i64[b]"
        program = nn.trace(self, inputs, method="learn", seed=seed)
        program.declare(name=c.name, context=c.text.context, vocab=c.text.vocab)
        return program

    def _stream(self) -> dict[str, str]:
        """The inputs of ``forward``."""
        if not self.config.modalities:
            return {"tokens": "i64[b, s]"}
        seen = {"seen": "i64[b, t]"} if self.config.cross_every else {}
        return {"tokens": "i64[b, s]", "media": f"f32[m, {self.config.text.dim}]", **seen}

    def _media(self) -> Media:
        c = self.config
        needs: dict[str, dict[str, int]] = {}
        if c.vision is not None:
            needs["image"] = {"size": c.vision.size}
        if c.audio is not None:
            needs["audio"] = {"rate": c.audio.rate, "samples": c.audio.samples}
        if c.video is not None:
            needs["video"] = {"frames": c.video.frames}
        encoders = tuple(Encoder(kind, f"encode_{kind}", **needs[kind]) for kind in c.modalities)
        return Media(c.text.vocab, c.text.dim, encoders, bool(c.cross_every))


def _row(x: nn.Tensor, index: nn.Tensor) -> nn.Tensor:
    """f[b, s, d] at index i64[b] -> f[b, d]."""
    taken: nn.Tensor = nn.emit("take_row", x, index)
    return taken[:, 0]


def _add(program: Program, more: Program) -> None:
    program.graphs.update(more.graphs)
    program.params.update(more.params)
