"""Dynamic loss scaling: gradients of f16 are computed times a number that keeps them in range, and divided by it."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.ir import Builder, IRError, Value

SCALE, GOOD, SKIPPED = "optimizer.loss_scale", "optimizer.good", "optimizer.skipped"
"""States: the scale, f32[]; updates since it last changed and updates left out so far, i64[]."""


@dataclass(frozen=True)
class LossScale:
    """As torch.amp.GradScaler has it (arXiv:1710.03740, section 3.2): the scale begins at ``initial``; an update whose
    gradients are not finite is left out and multiplies it by ``backoff``; ``interval`` updates in a row that are not, by
    ``growth``.

    Raises IRError for numbers out of range.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        if not (self.initial > 0 and self.growth >= 1 and 0 < self.backoff < 1 and self.interval >= 1):
            raise IRError(f"{self}: needed are initial > 0, growth >= 1, 0 < backoff < 1, interval >= 1")

    def update(self, b: Builder, scale: Value, good: Value, finite: Value) -> tuple[Value, Value]:
        """Scale and count of good updates after one whose gradients were ``finite`` (bool[])."""
        one_more = b.add(good, 1)
        enough = b.equal(one_more, self.interval)
        grown = b.mul(scale, self.growth)
        grown = b.select(b.logical_and(enough, b.less(grown, float("inf"))), grown, scale)
        zero = b.constant(0)
        return (
            b.select(finite, grown, b.mul(scale, self.backoff)),
            b.select(b.logical_and(finite, b.logical_not(enough)), one_more, zero),
        )
