"""A model of pictures, sounds, videos and text with random weights: the smallest with every entry point."""

from __future__ import annotations

from typing import Any

from wasat.frontend import nn
from wasat.frontend.nn import Tensor
from wasat.ir import Encoder, Generation, Interface, Media, Program

VOCAB, DIM, RATE = 259, 16, 8000
INPUTS: dict[str, dict[str, Any]] = {
    "forward": {"tokens": "i64[b, s]", "media": f"f32[m, {DIM}]"},
    "encode_image": {"image": "u8[h, w, 3]"},
    "encode_audio": {"audio": "f32[n]"},
    "encode_video": {"frames": "u8[n, h, w, 3]", "times": "f32[n]"},
}


class TinyMedia(nn.Module):
    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.see, self.hear = nn.Linear(48, DIM), nn.Linear(20, DIM)
        self.attention = nn.Attention(DIM, 2)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, media: Tensor) -> Tensor:
        row = nn.minimum(nn.maximum(tokens - VOCAB, 0), media.shape[0] - 1)
        seen = (tokens >= VOCAB)[..., None]
        x = nn.where(seen, nn.gather(media, row), self.embed(nn.minimum(tokens, VOCAB - 1)))
        return self.head(x + self.attention(x, nn.positions(x)))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.see(nn.patches(nn.resize(image, (8, 8)) / 255.0, 4))

    def encode_audio(self, audio: Tensor) -> Tensor:
        return self.hear(nn.log_mel(audio, RATE, mels=20, size=256, hop=128, method="plain"))

    def encode_video(self, frames: Tensor, times: Tensor) -> Tensor:
        picked, at = nn.sample_frames(frames, times, 2)
        rows = self.see(nn.patches(nn.resize(picked, (4, 4)) / 255.0, 4)) + at[:, None, None]
        return rows.reshape(-1, DIM)


def media_program() -> Program:
    """The four graphs, with the interface that makes an artifact of them."""
    model = TinyMedia()
    programs = [nn.trace(model, inputs, name, method=name, seed=3) for name, inputs in INPUTS.items()]
    params = {k: p for program in programs for k, p in program.params.items()}
    encoders = (
        Encoder("image", "encode_image"), Encoder("audio", "encode_audio", rate=RATE),
        Encoder("video", "encode_video", frames=2),
    )  # fmt: skip
    interface = Interface(
        "tiny-media", context=128, generation=Generation(257, (256,)), media=Media(VOCAB, DIM, encoders)
    )
    return Program({p.name: p for program in programs for p in program.graphs.values()}, params, interface)
