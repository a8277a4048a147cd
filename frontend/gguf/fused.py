"""Queries, keys and values that a file has in one tensor, of models that have them apart."""

from __future__ import annotations

import re
from dataclasses import replace

from wasat.frontend.weights.gguf import Gguf, GgufTensor

from .metadata import ARCHITECTURES

_FUSED = re.compile(r"(blk\.\d+)\.attn_qkv\.(weight|bias)\Z")


def apart(g: Gguf) -> Gguf:
    """The file with ``attn_q``, ``attn_k`` and ``attn_v`` in place of each ``attn_qkv`` (ChatGLM, and files that were
    converted with ``--fuse-qkv``), where the architecture knows them alone. Rows stay where they lie, in any format: queries
    are as many as the output's matrix reads, keys and values are equally many of the rest. What cannot be split so stays as it
    is, and is refused by name."""
    arch = ARCHITECTURES.get(str(g.metadata.get("general.architecture")))
    if arch is None:
        return g
    known = arch.names_of(g.tensors).layer
    if "attn_q" not in known or "attn_qkv" in known:
        return g
    found: dict[str, GgufTensor] = {}
    for name, t in g.tensors.items():
        of_layer = _FUSED.match(name)
        out = g.tensors.get(f"{of_layer[1]}.attn_output.weight") if of_layer else None
        rest = 0 if out is None else t.shape[0] - out.shape[-1]
        if of_layer is None or out is None or rest <= 0 or rest % 2 or not t.has_rows:
            found[name] = t
            continue
        queries, keys = out.shape[-1], rest // 2
        for part, start, count in (("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)):
            to = f"{of_layer[1]}.attn_{part}.{of_layer[2]}"
            found[to] = t.rows(to, start, count)
    return replace(g, tensors=found)
