"""Losses, as torch defines them. Of f16 and bf16 they are made, and returned, in f32."""

from __future__ import annotations

from wasat.ir import DType

from wasat import ir

from .arrays import floats, number, wide
from .functions import full, gather, log, log_softmax, softplus, take_along, where
from .tensor import Operand, Tensor, fail

REDUCTIONS = ("mean", "sum", "none")


def _reduce(what: str, each: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        fail(f"nn.{what}: the reduction is one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    return each.mean() if reduction == "mean" else each.sum() if reduction == "sum" else each


def _pair(what: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in f32; refused where one would be broadcast to the other, which no loss means."""
    floats(what, x, y)
    if x.dtype is not y.dtype:
        fail(f"nn.{what}: {x.value!r} and {y.value!r} differ in element type; cast one")
    if x.rank != y.rank or any(ir.equal(a, b) is not True for a, b in zip(x.shape, y.shape)):
        fail(f"nn.{what}: input and target have one shape, not {x.value!r} and {y.value!r}")
    return wide(x), wide(y)


def mse(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared error; ``reduction``: "mean", "sum" or "none"."""
    x, y = _pair("mse", input, target)
    return _reduce("mse", (x - y) * (x - y), reduction)


def l1(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Mean absolute error."""
    x, y = _pair("l1", input, target)
    return _reduce("l1", abs(x - y), reduction)


def huber(input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    """Half the square up to a distance of ``delta``, a line beyond."""
    if not delta > 0:
        fail(f"nn.huber: delta is {delta!r}; it must be above 0")
    x, y = _pair("huber", input, target)
    d = abs(x - y)
    return _reduce("huber", where(d <= delta, 0.5 * (d * d), delta * (d - 0.5 * delta)), reduction)


def smooth_l1(input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    """Half the square over ``beta`` up to a distance of ``beta``, a line beyond: :func:`huber` divided by its delta."""
    if not beta > 0:
        fail(f"nn.smooth_l1: beta is {beta!r}; it must be above 0")
    x, y = _pair("smooth_l1", input, target)
    d = abs(x - y)
    return _reduce("smooth_l1", where(d < beta, (0.5 / beta) * (d * d), d - 0.5 * beta), reduction)


def bce_with_logits(
    input: Tensor, target: Tensor, weight: Operand | None = None, reduction: str = "mean", pos_weight: Operand | None = None
) -> Tensor:
    """Binary cross-entropy of logits; targets in [0, 1]. ``pos_weight`` multiplies what positive targets lose."""
    x, t = _pair("bce_with_logits", input, target)
    extra: Operand = 1.0 if pos_weight is None else t * (pos_weight - full((), 1.0, t.dtype)) + 1.0
    each = (1.0 - t) * x + softplus(-x) * extra
    return _reduce("bce_with_logits", each if weight is None else each * weight, reduction)


def kl_div(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """``target * (log target - input)``: input are log-probabilities, target probabilities (or their logs: ``log_target``).

    ``reduction`` may be "batchmean", the sum over the size of axis 0, which is the divergence; "mean" divides by all elements.
    """
    x, t = _pair("kl_div", input, target)
    if log_target:
        from .functions import exp

        each = exp(t) * (t - x)
    else:
        some = t > 0.0
        each = where(some, t * log(where(some, t, 1.0)), 0.0) - t * x
    if reduction == "batchmean":
        if each.rank == 0:
            fail("nn.kl_div: a scalar has no batch")
        return each.sum() / number(each.shape[0])
    return _reduce("kl_div", each, reduction)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, axis: int = 1,
) -> Tensor:  # fmt: skip
    """Negative log-likelihood of classes under softmax: logits ``[n, classes, ...]``, targets integers ``[n, ...]``.

    ``axis`` is that of the classes: 1 as in torch, -1 for ``[b, s, vocab]``. Targets may be probabilities too, floats of the
    logits' shape. ``weight[classes]``: of each class. A target that is ``ignore_index``, or below 0, does not count. The mean
    is over the weight of the targets that count; 0 where none does.
    """
    floats("cross_entropy", input)
    if input.rank < 2:
        fail(f"nn.cross_entropy takes logits [n, classes, ...], not {input.value!r}")
    if not 0 <= label_smoothing < 1:
        fail(f"nn.cross_entropy: label_smoothing is {label_smoothing!r}; expected a share below 1")
    at = input._axis(axis)
    classes = input.shape[at]
    rest = [d for i, d in enumerate(input.shape) if i != at]
    if weight is not None:
        floats("cross_entropy", weight)
        if weight.rank != 1 or ir.equal(weight.shape[0], classes) is not True:
            fail(f"nn.cross_entropy: the weight is one number for each of {classes} classes, not {weight.value!r}")
        weight = wide(weight)
    logs = log_softmax(wide(input), axis=at)
    side = [classes if i == at else 1 for i in range(input.rank)]
    of_class = logs if weight is None else logs * weight.reshape(*side)
    share = full((), label_smoothing, logs.dtype) / number(classes)
    if target.dtype.is_float:
        _, t = _pair("cross_entropy", input, target)
        if label_smoothing:
            t = t * (1.0 - label_smoothing) + share
        each = -(of_class * t).sum(at)
        if reduction != "mean":
            return _reduce("cross_entropy", each, reduction)
        size = full((), 1.0, each.dtype)
        for d in rest:
            size = size * number(d)
        return each.sum() / size
    if target.dtype is DType.BOOL:
        fail(f"nn.cross_entropy: targets are class numbers or probabilities, not {target.value!r}")
    if target.rank != len(rest) or any(ir.equal(a, b) is not True for a, b in zip(target.shape, rest)):
        fail(
            f"nn.cross_entropy: targets {target.value!r} are not one for each place of {input.value!r} along axis {at}, "
            f"the classes'; say which axis the classes are: axis=-1"
        )
    counts = (target >= 0) & (target != ignore_index)
    safe = where(counts, target, 0)
    index = safe.reshape(*rest[:at], 1, *rest[at:])
    each = -take_along(of_class, index, axis=at).reshape(*rest)
    if label_smoothing:
        each = each * (1.0 - label_smoothing) - of_class.sum(at) * share
    each = where(counts, each, 0.0)
    if reduction != "mean":
        return _reduce("cross_entropy", each, reduction)
    mass = full(rest, 1.0, each.dtype) if weight is None else gather(weight, safe)
    count = where(counts, mass, 0.0).sum()
    return each.sum() / where(count > 0.0, count, 1.0)  # the form that accumulating steps know
