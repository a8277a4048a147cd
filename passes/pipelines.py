"""The passes that a compilation runs, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from .cleanup import Cleanup
from .core import Pass
from .fuse_activations import FuseActivations
from .fuse_attention import FuseAttention
from .fuse_glu import FuseGlu
from .fuse_norm import FuseNorm
from .fuse_rope import FuseRope
from .hoist_params import HoistParams
from .kv_cache import DeriveKVCache
from .merge_linears import MergeLinears
from .quantize import Quantize
from .simplify_indices import SimplifyIndices
from .tables import ReadTables


def default_pipeline(
    *, quantize: str | None = None, activation: str | None = "int8", overrides: Mapping[str, str] | None = None,
    kv_cache: Literal["required", "tried"] | None = "required", chunk: int = 512,
) -> list[Pass]:  # fmt: skip
    """The passes of :func:`wasat.compile`, with its options.

    ``kv_cache``: whether ``forward`` becomes ``prefill`` and ``decode``; ``"tried"``: where that can be proved, else not.
    """
    passes: list[Pass] = [
        Cleanup(fold_positions=False), ReadTables(), SimplifyIndices(), FuseNorm(), FuseRope(), FuseActivations(),
        FuseAttention(), Cleanup(),
    ]  # fmt: skip
    if quantize is not None or overrides:
        passes.append(Quantize(quantize or "f32", activation, tuple((overrides or {}).items())))
    passes += [MergeLinears(), FuseGlu(), HoistParams()]
    if kv_cache is not None:
        passes.append(DeriveKVCache(chunk=chunk, required=kv_cache == "required"))
    return [*passes, Cleanup()]
