"""The curve of a run as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .checkpoint import replacing

_W, _H, _LEFT, _TOP, _RIGHT, _BOTTOM = 800, 400, 60, 40, 20, 40
Points = Sequence[tuple[int, float]]


def write_curve(path: Path, title: str, series: Mapping[str, Points], notes: Sequence[str] = ()) -> None:
    """A page with ``series``, each (step, value) by name, drawn over the steps (values that are not finite are left out), and
    ``notes`` beneath."""
    drawn = {k: [(x, y) for x, y in points if math.isfinite(y)] for k, points in series.items()}
    drawn = {k: points for k, points in drawn.items() if points}
    xs, ys = [x for p in drawn.values() for x, _ in p], [y for p in drawn.values() for _, y in p]
    x0, x1 = (min(xs), max(xs)) if xs else (0, 1)
    y0, y1 = (min(ys), max(ys)) if ys else (0.0, 1.0)
    x1, y1 = max(x1, x0 + 1), y1 if y1 > y0 else y0 + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return _LEFT + across * (_W - _LEFT - _RIGHT), _H - _BOTTOM - up * (_H - _TOP - _BOTTOM)

    parts = [
        f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"/><title>{escape(title)}</title></head><body>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_W} {_H}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_W}" height="{_H}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        _, py = at(x0, y)
        parts.append(f'<path d="M{_LEFT} {py:.1f}H{_W - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        x = round(x0 + (x1 - x0) * i / 4)
        parts.append(f'<text x="{at(x, y0)[0]:.1f}" y="{_H - 16}" text-anchor="middle">{x}</text>')
    for i, (name, points) in enumerate(drawn.items()):
        colour = ("#4477aa", "#cc3311", "#228833")[i % 3]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for px, py in [at(x, y) for x, y in points] if len(points) < 100 else []:
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{colour}"/>')
        label = f"{name} {points[-1][1]:.4g}"
        parts.append(f'<text x="{_W - _RIGHT}" y="{20 + 16 * i}" text-anchor="end" fill="{colour}">{escape(label)}</text>')
    parts += ["</svg>", *(f"<p>{escape(note)}</p>" for note in notes), "</body></html>", ""]
    with replacing(path) as f:
        f.write("\n".join(parts).encode())
