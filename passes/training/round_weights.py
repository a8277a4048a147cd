"""Training with rounded weights: the graph computes with the numbers that the quantized model will have."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.ir import Builder, DType, Program, QTensorType, Value

from ..core import Pass, PassError, Remarks
from ..serving.quantize import Quantize, QuantizedGraph
from ..serving.recipes import FLOATS, PLAIN, Storage

SCHEMES = (*PLAIN, *FLOATS, "f32")
"""Those whose numbers follow from the weights without a search."""


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Weights of ``linear`` and ``embedding`` on @graph are read as :class:`Quantize` with the same options stores them, to the
    bit; gradients go straight through to the weights, which stay f32 (quantization-aware training, arXiv:1712.05877).
    Parameters that are not trained are rounded, too; activations are not.

    Raises PassError for a scheme that searches its scales (``int4``, ``s4``, …), and what Quantize raises.
    """

    scheme: str = "int8"
    overrides: tuple[tuple[str, str], ...] = ()
    block: int = 32
    graph: str = "loss"
    name = "round-weights"
    exact = False

    @property
    def stored(self) -> Quantize:
        """What the weights are rounded for."""
        return Quantize(self.scheme, None, self.overrides, self.block)

    def requires(self, program: Program) -> None:
        self.stored.requires(program)
        for scheme in (self.scheme, *(s for _, s in self.overrides)):
            if scheme not in SCHEMES:
                raise PassError(f"weights cannot be trained rounded to {scheme!r}, but to {', '.join(SCHEMES)}")

    def run(self, program: Program, remarks: Remarks) -> bool:
        made = _Rounded(self.stored, program[self.graph], program.params, remarks)
        made.exchange()
        for scheme, n in made.count.items():
            remarks.applied(f"{n} weight{'s' if n > 1 else ''} rounded to {scheme}", made.graph)
        if not made.small:
            remarks.missed("it has no weight to round", made.graph)
        return bool(made.small)


class _Rounded(QuantizedGraph):
    """Rounding of the weights of one graph."""

    def made(self, b: Builder, w: Value, found: Storage) -> Value:
        """What is stored, widened."""
        if isinstance(found.type, DType):
            return b.cast(b.cast(w, dtype=found.type), dtype=w.tensor.dtype)
        t = found.type
        assert isinstance(t, QTensorType)
        return b.fake_quantize(w, scheme=t.scheme, block=t.block, scale=t.scale)

    def obstacle(self, w: Value, found: Storage) -> str | None:
        """None: weights of tomorrow are not known."""
        return None
