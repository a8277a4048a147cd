"""The passes that a compilation runs, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from wasat.ir import Interface

from .cleanup.algebra import Cleanup
from .cleanup.hoist_params import HoistParams
from .cleanup.read_tables import ReadTables
from .cleanup.simplify_indices import SimplifyIndices
from .core import Pass
from .fusion.fuse_activations import FuseActivations
from .fusion.fuse_attention import FuseAttention
from .fusion.fuse_experts import FuseExperts
from .fusion.fuse_glu import FuseGlu
from .fusion.fuse_norm import FuseNorm
from .fusion.fuse_recurrence import FuseRecurrence
from .fusion.fuse_rope import FuseRope
from .fusion.merge_linears import MergeLinears
from .serving.equalize import Equalize
from .serving.fold_dequantized import FoldDequantized
from .serving.kv_cache import DeriveKVCache
from .serving.quantize import KeepQuantized, Quantize
from .serving.quantize_caches import QuantizeCaches
from .serving.recipes import ALL, AS_THEY_ARE, FLOATS, Formats
from .training.precision import MixedPrecision

__all__ = [
    "Cleanup", "DeriveKVCache", "Equalize", "FoldDequantized", "FuseActivations", "FuseAttention", "FuseExperts", "FuseGlu",
    "FuseNorm", "FuseRecurrence", "FuseRope", "HoistParams", "KeepQuantized", "MergeLinears", "Quantize", "QuantizeCaches",
    "ReadTables", "SimplifyIndices", "default_pipeline",
]  # fmt: skip


def default_pipeline(
    *, quantize: str | None = None, activation: str | None = "int8", overrides: Mapping[str, str] | None = None,
    kv_cache: Literal["required", "tried"] | None = "required", chunk: int = 512,
    granule: int = Interface.granule, keep_forward: bool = False, formats: Formats = ALL, cache: str = "f32",
    rounded: str | None = None, text: Callable[[], tuple[int, ...]] = tuple,
) -> list[Pass]:  # fmt: skip
    """The passes of :func:`wasat.compile`, with its options.

    ``kv_cache``: whether ``forward`` becomes ``prefill`` and ``decode``; ``"tried"``: where that can be proved, else not.
    ``activation``: ``"int8"``, None, or ``"bf16"`` and ``"f16"`` for activations (and caches) of ``forward`` in half precision,
    once its operations are fused. ``keep_forward``: it stays beside them.
    ``formats``: which a recipe for ``quantize`` may choose.
    ``cache``: ``"int8"`` and ``"int4"`` round keys and values; other ones are the target's affair.
    ``rounded``: the scheme whose rounding the weights were trained with: they are stored in it as they are. ``text``: gives
    the tokens over which :class:`Equalize` measures, where it is among the passes.
    """
    half = activation if activation in ("bf16", "f16") else None
    activation = None if half else activation
    passes: list[Pass] = [
        FoldDequantized(), Cleanup(fold_positions=False), ReadTables(), SimplifyIndices(), FuseNorm(), FuseRope(),
        FuseActivations(), FuseAttention(whole=kv_cache is None), Cleanup(), FuseRecurrence(), FuseExperts(), Cleanup(),
        KeepQuantized(activation),
    ]  # fmt: skip
    if quantize is not None or overrides:
        scheme, given = quantize or "f32", tuple((overrides or {}).items())
        if scheme not in (*FLOATS, "f32", AS_THEY_ARE, rounded):
            passes.append(Equalize(text=text(), scheme=scheme, activation=activation, overrides=given, formats=formats))
        passes.append(Quantize(scheme, activation, given, formats=formats))
    passes += [MergeLinears(), FuseGlu(), HoistParams()]
    if half:
        passes += [MixedPrecision("forward", half), HoistParams()]
    if kv_cache is not None:
        derive = DeriveKVCache(chunk=chunk, required=kv_cache == "required", granule=granule, keep=keep_forward)
        passes += [derive, HoistParams()]
    passes.append(Cleanup())
    if cache not in ("f32", "f16"):
        passes.append(QuantizeCaches(cache))
    return passes
