"""What a notebook shows of graphs and programs: short, and with nothing that a browser would take for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
from wasat.ir import Builder, Graph, Program, parse_type


def graph(name: str = "forward", nodes: int = 2) -> Graph:
    g = Graph(name)
    b = Builder(g)
    x = g.add_input("<x>&", parse_type("f32[n, 3]"))
    w = g.add_param('w"<script>', parse_type("f32[3]"))
    y = b.mul(x, w)
    for _ in range(nodes - 1):
        y = b.add(y, b.constant(np.ones(3, np.float32)))
    g.set_outputs([y], ["<b>"])
    return g


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_are_escaped_and_tags_close() -> None:
    shown = Tags(graph()._repr_html_())
    assert shown.seen == {"div", "b", "table", "tr", "th", "td", "code", "details", "summary", "pre"}
    for part in ("@forward", "<x>&: f32[n, 3]", 'w"<script>: f32[3]', "<b>: f32[n, 3]", "mul 1", "add 1", "2 nodes"):
        assert part in shown.text


def test_large_graphs_stay_short() -> None:
    text = graph(nodes=500)._repr_html_()
    assert len(text) < 20_000
    assert re.search(r"… 440 more; str\(graph\) has all", text)
    assert "500 nodes" in text


def test_a_program_shows_each_graph() -> None:
    shown = Tags(Program({k: graph(k) for k in ("encode", "decode")})._repr_html_())
    assert shown.text.index("@encode") < shown.text.index("@decode")
    assert Tags(Program({})._repr_html_()).text == ""
