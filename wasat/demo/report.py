"""The demonstration as one HTML file: pictures, sounds and clips are inside, nothing is fetched."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from wasat.runtime import Audio, Video
from wasat.runtime.media import open_media


@dataclass(frozen=True)
class Card:
    """A question about files, and what the model made of it."""

    title: str
    media: tuple[Path, ...]
    question: str
    expected: str
    answer: str
    seconds: float
    """From opening the files to the last token."""
    without: str | None
    """The answer with black pictures, silence, clips that stand still; None where there are no media."""

    @property
    def right(self) -> bool:
        """To the letter."""
        return self.answer == self.expected


@dataclass
class Chapter:
    """What there is to show of one model."""

    name: str
    folder: Path
    quantize: str
    facts: dict[str, str] = field(default_factory=dict)
    graphs: list[tuple[str, str, str, int]] = field(default_factory=list)
    """Of each: name, inputs, outputs, nodes."""
    passes: list[tuple[str, str, str]] = field(default_factory=list)
    """Of each that did something: name, nodes before and after, what."""
    before: str = ""
    """An attention as it is declared."""
    after: str = ""
    """The same in @decode."""
    files: list[tuple[str, int]] = field(default_factory=list)
    """Of the artifact, with their bytes."""
    cards: list[Card] = field(default_factory=list)
    texts: list[tuple[str, str, str]] = field(default_factory=list)
    """Prompt, what the model wrote, how fast."""


def blind_score(cards: Sequence[Card]) -> str:
    """How many answers are right without the media, of those questions that have any."""
    media = [c for c in cards if c.without is not None]
    return f"{sum(c.without == c.expected for c in media)} of {len(media)}"


def write_page(path: Path, chapters: Sequence[Chapter], command: str) -> None:
    """Writes the file; ``command`` is the one that made it. Raises MediaError for a card's file that cannot be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(_chapter(c) for c in chapters)
    path.write_text(_PAGE.substitute(style=_STYLE, body=body, command=escape(command)), encoding="utf-8")


def _chapter(c: Chapter) -> str:
    parts = [f"<h2>{escape(c.name)}</h2>", _facts(c.facts.items())]
    if c.cards:
        parts += [
            f"<p>{sum(card.right for card in c.cards)} of {len(c.cards)} answers are right; with black pictures, silence and "
            f"clips that stand still, {blind_score(c.cards)}. The files come from the held-out splits of the tasks in "
            "examples/gemini.toml (examples/make_media.py): of each of these kinds of question the first one, whether its "
            "answer is right or not.</p>",
            f'<div class="cards">{"".join(map(_card, c.cards))}</div>',
        ]
    parts += [
        f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre><p class=dim>{escape(speed)}</p>" for prompt, text, speed in c.texts
    ]
    if (curve := c.folder / "curve.html").exists():
        page = curve.read_text(encoding="utf-8")
        svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
        parts += ["<h3>How it learned</h3>", f'<div class="curve">{svg}</div>']
    parts += [
        "<h3>Graphs</h3>", _table(("graph", "takes", "gives", "nodes"), c.graphs),
        "<h3>Attention, as it is declared</h3>", f"<pre>{escape(c.before)}</pre>",
        "<h3>The same in decode, after the passes</h3>", f"<pre>{escape(c.after)}</pre>",
        "<details><summary>What each pass did</summary>", _table(("pass", "nodes", "what it did"), c.passes), "</details>",
        f"<h3>The artifact, weights in {escape(c.quantize)}</h3>",
        _table(("file", "MB"), [(name, f"{size / 1e6:.2f}") for name, size in c.files]),
    ]  # fmt: skip
    return f"<section>{''.join(parts)}</section>"


def _card(c: Card) -> str:
    media = "".join(map(_medium, c.media)) or f"<pre>{escape(c.question)}</pre>"
    verdict = '<b class="yes">right</b>' if c.right else f'<b class="no">wrong</b>: expected <q>{escape(c.expected)}</q>'
    without = "" if c.without is None else f"; without the medium: <q>{escape(c.without)}</q>"
    return (
        f'<figure><h3>{escape(c.title)}</h3><div class="media">{media}</div><figcaption>'
        + (f'<p class="question">{escape(c.question)}</p>' if c.media else "")
        + f'<p class="answer">{escape(c.answer) or "…"}</p><p class="dim">{verdict}{without}</p>'
        f'<p class="dim">{c.seconds * 1e3:.0f} ms</p></figcaption></figure>'
    )


def _medium(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    medium = open_media(path)
    if isinstance(medium, Audio):
        return f'<div>{_waveform(medium)}<audio controls src="{source}"></audio></div>'
    if isinstance(medium, Video) and not kind.startswith("image/"):
        return f'<video src="{source}" autoplay loop muted playsinline controls></video>'
    return f'<img src="{source}" alt="{escape(path.name)}">'


def _waveform(sound: Audio, columns: int = 160) -> str:
    """The extremes of each of so many equal parts, over time."""
    parts = np.array_split(sound.samples(8000), columns)
    lines = " ".join(f"M{i} {50 - 48 * p.max():.1f}V{51 - 48 * p.min():.1f}" for i, p in enumerate(parts) if len(p))
    return f'<svg class="wave" viewBox="0 0 {columns} 100" preserveAspectRatio="none"><path d="{lines}"/></svg>'


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in rows)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(x))}</{tag}>' for x in cells)}</tr>"

    return f'<div class="wide"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #626a73; --paper: #f6f7f9; --card: #fff; --line: #dde1e6;
  --mark: #2f5fd0; --yes: #18794e; --no: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #98a2ad; --paper: #101317; --card: #191d23;
  --line: #2c323a; --mark: #8cabff; --yes: #4cc38a; --no: #ff8589; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 2.1rem; letter-spacing: -0.02em; }
h2 { margin: 3rem 0 0.75rem; padding-top: 1.5rem; border-top: 1px solid var(--line); font-size: 1.45rem;
  letter-spacing: -0.01em; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1rem; }
.dim { color: var(--dim); font-size: 0.875rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 0 0 1.25rem; }
dl div { padding: 0.5rem 0.9rem; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; }
dt { color: var(--dim); font-size: 0.75rem; text-transform: uppercase; letter-spacing: 0.05em; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: 1rem; }
figure { display: flex; flex-direction: column; min-width: 0; margin: 0; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 0.9rem; }
figure h3 { margin: 0 0 0.75rem; color: var(--dim); font-size: 0.8rem; font-weight: 600; text-transform: uppercase;
  letter-spacing: 0.05em; }
figure p { margin: 0.25rem 0; overflow-wrap: anywhere; }
.media { display: flex; gap: 0.75rem; align-items: center; justify-content: center; height: 12rem; }
.media img, .media video { min-width: 0; max-width: 100%; height: 100%; object-fit: contain; border-radius: 0.5rem; }
.media div { flex: 1; min-width: 0; }
.media pre { width: 100%; margin: 0; font-size: 1.1rem; text-align: center; white-space: pre-wrap; }
.wave { display: block; width: 100%; height: 6rem; margin-bottom: 0.75rem; }
.wave path { stroke: var(--mark); stroke-width: 0.8; fill: none; }
audio { width: 100%; }
figcaption { margin-top: 0.75rem; }
.answer { font-size: 1.35rem; font-weight: 650; line-height: 1.3; }
.yes { color: var(--yes); } .no { color: var(--no); }
pre { overflow-x: auto; padding: 0.9rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  font: 0.8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.25rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
.curve { max-width: 50rem; } .curve svg { display: block; width: 100%; border-radius: 0.6rem; }
details { margin-top: 1.75rem; } summary { font-weight: 600; cursor: pointer; }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Wasat: the demonstration</title>
<style>$style</style>
</head>
<body>
<h1>Wasat</h1>
<p>Models become graphs, passes fuse and quantize them and derive their caches, TVM compiles them, and the artifacts answered
what you see here on this machine.</p>
$body
<h2>Again</h2>
<pre>$command</pre>
</body>
</html>
""")
