"""Where the command line puts pictures, sounds and videos into a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from wasat.cli.app import _parts
from wasat.cli.console import Refusal

SEEN: dict[str, list[Any]] = {"image": ["I", "J"], "audio": ["A"], "video": []}


@pytest.mark.parametrize("text, parts", [
    ("what?", ["I", "J", "A", "what?"]),
    ("a {image} b {x} {video}", ["J", "A", "a ", "I", " b {x} {video}"]),
    ("{audio}{image}{image}", ["A", "I", "J"]),
])  # fmt: skip
def test_places(text: str, parts: list[str]) -> None:
    assert _parts(text, SEEN) == parts


def test_braces_of_a_text_without_media() -> None:
    assert _parts('f"{image}"', {"image": [], "audio": []}) == 'f"{image}"'


def test_more_places_than_media() -> None:
    with pytest.raises(Refusal, match=r"more than 1 \{audio\}: give --audio"):
        _parts("{audio} {audio}", SEEN)
