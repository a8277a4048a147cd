"""What a calibration decided, and what it costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from wasat.quality import Quality

_SHOWN = 6
"""Of lines about features, how many are printed."""


@dataclass(frozen=True)
class Stored:
    """One weight in fewer bits."""

    name: str
    layer: str
    """What its name shares with the weights of its layer; or its name."""
    type: str
    """Scheme and shape: ``s5b192[2048, 192]``."""
    size: int
    """How many numbers it holds."""
    bits: float
    """Of each, scales included."""
    read: bool
    """Whether the text passed it; if not, its scales were searched without weighting."""
    error: float
    """Of what it adds to results, as a part of these: root of the mean square over the text."""
    share: float | None
    """Of the whole expected divergence; None where that was not measured."""

    @property
    def scheme(self) -> str:
        return self.type.partition("[")[0]


@dataclass(frozen=True)
class Report:
    """Printed, a table; :meth:`to_json` has all of it."""

    recipe: str
    asked: float | None
    """Bits a weight that were asked for."""
    bits: float
    """Bits of all parameters, scales and what stays f32 included, for each number in them."""
    count: int
    """Numbers in all parameters."""
    tokens: int
    """Of the text that it was calibrated on."""
    quality: Quality
    """On the held-out text, beside f32; rows in f32 on both sides, so that it is weights alone that are compared."""
    weights: tuple[Stored, ...]
    left: dict[str, str]
    """Weights that stay as they are, and why."""
    equalized: tuple[str, ...] = ()
    """Which features were made one size, and which not, and why."""

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        q = self.quality
        lines = [f"{'layer':40} {'weights':>10} {'bits':>6} {'error':>7} {'share':>6}  schemes"]
        layers: dict[str, list[Stored]] = {}
        for w in self.weights:
            layers.setdefault(w.layer, []).append(w)
        for layer, found in layers.items():
            size = sum(w.size for w in found)
            bits = sum(w.bits * w.size for w in found) / size
            error = max(w.error for w in found)
            shares = [w.share for w in found if w.share is not None]
            share = f"{100 * sum(shares):5.1f}%" if shares else ""
            schemes = Counter(w.scheme for w in found)
            said = ", ".join(s if n == 1 and len(found) == 1 else f"{n} {s}" for s, n in sorted(schemes.items()))
            lines.append(f"{layer:40} {size:10,} {bits:6.2f} {error:7.4f} {share:>6}  {said}")
        unread = sum(not w.read for w in self.weights)
        if unread:
            lines.append(f"{unread} weights belong to what no text passes: they are not calibrated")
        lines += [f"{name} stays as it is: {why}" for name, why in self.left.items()]
        more = len(self.equalized) - _SHOWN
        lines += [*self.equalized[:_SHOWN], *([f"… and {more} more of that, in the JSON"] if more > 0 else [])]
        lines += [
            "",
            f"{self.bits:.3f} bits a weight, everything included, of {self.count:,}; calibrated on {self.tokens} tokens",
            f"{q.tokens} tokens held out: KL {q.kl:.5f} (99% below {q.kl_99:.5f}), same top token {100 * q.same_top:.1f}%, "
            f"perplexity {q.perplexity:.4f} (f32 {q.base_perplexity:.4f})",
        ]
        return "\n".join(lines)

