"""Numbers that a program holds, against the integers that a device has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from wasat.ir import DType, IRError, Node, TensorType

from .device import Device


def check_integers(nodes: Iterable[Node], device: Device) -> None:
    """Raises IRError, naming the node, for an integer of 64 bits that the device would carry in fewer and cannot."""
    if device.integers >= 64:
        return
    most = 2 ** (device.integers - 1)
    for node in nodes:
        if not any(isinstance(v.type, TensorType) and v.tensor.dtype is DType.I64 for v in node.outputs):
            continue
        const = node.outputs[0].const
        held = [int(n) for n in (const.min(), const.max())] if const is not None and const.size else []
        if dataclasses.is_dataclass(node.attrs):
            values = (getattr(node.attrs, f.name) for f in dataclasses.fields(node.attrs))
            held += [int(x) for x in values if isinstance(x, (int, float, np.number)) and np.isfinite(x)]
        for n in held:
            if not -most <= n < most:
                raise IRError(f"{node!r}: {n} does not fit into the {device.integers} bits that this target has", node.loc)
