"""Losses as graphs: functions of a Builder and values, and the loss graph of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wasat.ir import Builder, DType, Graph, IRError, Program, Type, Value, parse_type


def add_loss(
    program: Program, build: Callable[[Builder, Mapping[str, Value]], Value | Mapping[str, Value]],
    inputs: Mapping[str, str | Type], *, graph: str = "forward", name: str = "loss",
) -> Graph:  # fmt: skip
    """Adds @name to ``program``: @graph with more ``inputs``, what ``build`` makes of it as outputs.

    ``build(b, values)`` sees inputs and outputs by name and returns the loss (output ``loss``), or several outputs by name,
    of which the first is the loss.
    """
    g = program[graph].clone(name)
    for key, t in inputs.items():
        g.add_input(key, parse_type(t) if isinstance(t, str) else t)
    made = build(Builder(g), {**{v.name: v for v in g.inputs}, **dict(zip(g.output_names, g.outputs))})
    outputs = {"loss": made} if isinstance(made, Value) else dict(made)
    g.set_outputs(list(outputs.values()), list(outputs))
    if name in program.graphs:
        raise IRError(f"the program has a graph @{name}; give the loss another name")
    program.graphs[name] = g
    return g


def cross_entropy(
    b: Builder, logits: Value, labels: Value, *, mask: Value | None = None, weight: Value | None = None,
    smoothing: float = 0.0, z_loss: float = 0.0,
) -> Value:  # fmt: skip
    """Mean of ``-log softmax(logits)[label]`` over the places whose label is not below 0; a scalar of f32 or wider.

    logits f[*, classes]; labels int[*]; mask bool[*]: where it is false is no place either, whatever the label; with no place
    left the loss is 0. ``smoothing`` takes that share of each target and spreads it over all classes (arXiv:1512.00567);
    ``z_loss`` times the squared log of the normalizer is added (arXiv:2204.02311). ``weight`` f[classes]: of each class, in
    the sum and in the count (torch.nn.CrossEntropyLoss).
    """
    x = _wide(b, logits)
    dtype = x.tensor.dtype
    last = len(x.shape) - 1
    mask = _places(b, labels, mask)
    labels = b.select(mask, labels, b.constant(0, labels.tensor.dtype))
    at = b.reshape(labels, shape=(*labels.shape, 1))
    normalizer = b.logsumexp(x, axes=(last,), keepdims=True)
    each = b.reshape(b.sub(normalizer, b.take_along(x, at, axis=last)), shape=labels.shape)
    of_label = None
    if weight is not None:
        weight = b.cast(weight, dtype=dtype)
        of_label = b.gather(weight, labels, axis=0)
        each = b.mul(each, of_label)
    if smoothing:
        rest = b.sub(normalizer, x)
        rest = b.reduce_mean(rest if weight is None else b.mul(rest, weight), axes=(last,))
        each = b.add(b.mul(each, 1 - smoothing), b.mul(rest, smoothing))
    if z_loss and weight is None:  # one mean of both
        each = b.add(each, b.mul(b.reshape(b.mul(normalizer, normalizer), shape=labels.shape), z_loss))
    loss = _mean(b, each, mask, of_label)
    if z_loss and weight is not None:
        square = b.reshape(b.mul(normalizer, normalizer), shape=labels.shape)
        loss = b.add(loss, b.mul(_mean(b, square, mask, None), z_loss))
    return loss


def accuracy(b: Builder, logits: Value, labels: Value, *, mask: Value | None = None) -> Value:
    """Share of the places, those of :func:`cross_entropy`, whose largest logit is the label's, f32; 0 of no places."""
    right = b.equal(b.arg_max(logits, axis=-1), b.cast(labels, dtype=DType.I64))
    return _mean(b, b.cast(right, dtype=DType.F32), _places(b, labels, mask), None)


def contrastive(b: Builder, x: Value, y: Value, log_scale: Value) -> Value:
    """The symmetric loss of CLIP (arXiv:2103.00020): row i of ``x`` belongs to row i of ``y`` and to no other.

    x, y f[n, d], any lengths; log_scale f[], the log of the inverse temperature. Mean of the cross-entropies of x among y
    and of y among x, over cosines times exp(log_scale).
    """
    x, y = (_unit(b, _wide(b, v)) for v in (x, y))
    cosines = b.matmul(x, b.transpose(y, perm=(1, 0)))
    logits = b.mul(cosines, b.exp(b.cast(log_scale, dtype=cosines.tensor.dtype)))
    own = b.iota(size=x.shape[0])
    both = [cross_entropy(b, v, own) for v in (logits, b.transpose(logits, perm=(1, 0)))]
    return b.mul(b.add(*both), 0.5)


def _places(b: Builder, labels: Value, mask: Value | None) -> Value:
    """Where labels count: -1, -100 and such are no classes."""
    places = b.greater_equal(labels, 0)
    return places if mask is None else b.logical_and(places, mask)


def _wide(b: Builder, x: Value) -> Value:
    return b.cast(x, dtype=DType.F32) if x.tensor.dtype.bits < 32 else x


def _unit(b: Builder, x: Value) -> Value:
    return b.mul(x, b.rsqrt(b.add(b.reduce_sum(b.mul(x, x), axes=(1,), keepdims=True), 1e-12)))


def _mean(b: Builder, x: Value, mask: Value, weight: Value | None) -> Value:
    """Mean of ``x`` where ``mask`` is true, over the ``weight`` (1 by default) that is there."""
    axes = tuple(range(len(x.shape)))
    zero = b.constant(0.0, x.tensor.dtype)
    if weight is None:
        weight = b.broadcast_to(b.constant(1.0, x.tensor.dtype), shape=x.shape)
    x, weight = b.select(mask, x, zero), b.select(mask, weight, zero)
    count = b.reduce_sum(weight, axes=axes)
    return b.div(b.reduce_sum(x, axes=axes), b.select(b.greater(count, 0.0), count, b.constant(1.0, x.tensor.dtype)))
