"""A comparison as text."""

from __future__ import annotations

from collections.abc import Iterator

from .found import Comparison, Difference, Stage


def text(found: Comparison) -> str:
    """For a terminal: what differs first, what else, outputs, overflows, the text."""
    return "\n".join(_lines(found))


def _lines(found: Comparison) -> Iterator[str]:
    yield f"a: {found.a}"
    yield f"b: {found.b}"
    for stage in found.stages:
        yield ""
        yield from _stage(stage)
    if found.outputs:
        yield ""
        yield f"{'output':24} {'largest':>10} {'mean':>10} {'of its bound':>13}"
        for d in found.outputs:
            share = d.note or f"{d.ratio:12.3g}x"
            yield f"{d.value:24.24} {d.largest:10.3g} {d.mean:10.3g} {share:>13}" + (" DIFFERS" if d.differs else "")
    if found.unlike:
        yield ""
    for what in found.unlike:
        yield f"output {what}"
    for alarm in found.alarms:
        beyond = f"reaches {alarm.largest:.6g}: f16 holds 65504"
        what = {"nan": "makes NaN", "inf": "makes an infinity", "f16": beyond}[alarm.what]
        yield ""
        yield f"overflow ({alarm.side}): %{alarm.value} = {alarm.op} {what}" + _place(alarm.layer, alarm.line)
    if found.text is not None:
        t = found.text
        limit = "" if found.max_kl is None else f" (at most {found.max_kl:g})"
        yield ""
        yield f"{t.tokens} tokens: KL {t.kl:.6f}{limit}, 99% below {t.kl_99:.6f}; same top token {100 * t.same_top:.2f}%"
        yield f"perplexity: a {t.base_perplexity:.4f}, b {t.perplexity:.4f}"
    yield ""
    yield "they DIFFER" if not found.ok else "within the limits" if _meant(found) else "no difference beyond rounding"


def _meant(found: Comparison) -> bool:
    return any(s.meant for s in found.stages) or any(d.note for d in found.outputs)


def _stage(stage: Stage) -> Iterator[str]:
    yield f"{stage.name}: {stage.values} compared, {len(stage.differences) or 'none'} beyond their bounds"
    for i, d in enumerate(stage.differences[:8]):
        yield f"  {'first' if i == 0 else 'also '} %{d.value} = {d.op}: {_element(d)}" + _place(d.layer, d.line)
    if len(stage.differences) > 8:
        yield f"  and {len(stage.differences) - 8} more"
    if stage.closest and not stage.differences:
        d = stage.closest[0]
        yield f"  nearest to its bound: %{d.value} = {d.op}, {d.ratio:.2g} of it"
    if stage.meant:
        yield f"  {len(stage.meant)} differ by design ({stage.meant[0].note}); relative error, largest first:"
        for d in stage.meant[:5]:
            yield f"    {d.error:8.2g}  %{d.value} = {d.op}" + (f" in {d.layer}" if d.layer else "")
    for why in stage.skipped[:4]:
        yield f"  not compared: {why}"
    if len(stage.skipped) > 4:
        yield f"  and {len(stage.skipped) - 4} more not compared"


def _element(d: Difference) -> str:
    at = f"[{', '.join(map(str, d.index))}]"
    return f"{at} is {d.a:.7g} and {d.b:.7g}, {d.error:.2g} apart, {d.ratio:.3g} times what roundings allow"


def _place(layer: str, line: str) -> str:
    return (f", in {layer}" if layer else "") + (f"\n      at {line}" if line else "")
