"""What ONNX lets an attribute be. Another value means nothing: what a file that holds one would compute is anyone's guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = (
    "align_corners allowzero antialias ceil_mode center_point_box count_include_pad detect_negative detect_positive "
    "exclude_outside exclusive fmod input_forget interleaved inverse is_case_sensitive is_causal keepdims largest layout "
    "linear_before_reset new_axis noop_with_empty_axes onesided periodic reverse saturate select_last_index sorted "
    "storage_order training_mode transA transB upper zeros"
)
FLAGS = frozenset(_WORDS.split())
"""Attributes of any operator that are 0 or 1."""
ALLOWED: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("LpNormalization", "p"): (1, 2), ("ReverseSequence", "time_axis"): (0, 1), ("ReverseSequence", "batch_axis"): (0, 1),
    ("Attention", "qk_matmul_output_mode"): (0, 1, 2, 3),
}  # fmt: skip
"""(operator, attribute) -> what it may be."""
ALONE = frozenset({"Constant"})
"""Operators that have one attribute."""


def wrong_value(operator: str, attrs: Mapping[str, Any]) -> str | None:
    """What of an operator's attributes ONNX has no meaning for, in words; None: nothing."""
    for name, value in attrs.items():
        allowed = ALLOWED.get((operator, name), (0, 1) if name in FLAGS else None)
        if allowed is not None and value not in allowed:
            return f"{name} is {value}; it is {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
    if operator in ALONE and len(attrs) > 1:
        return f"it has {len(attrs)} attributes, {' and '.join(sorted(attrs))}, and may have one"
    return None
