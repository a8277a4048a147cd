"""A text that says what a model's features are like, where none is given: prose, code, numbers and a few languages."""

from __future__ import annotations

import itertools

from wasat.ir import Program

SAMPLE = """The lighthouse keeper counted eleven ships before breakfast. "None of them will stop," she told the boy, who had
rowed out with bread, two letters and a bill for $14.50. He asked why she kept the lamp burning through the summer; she
laughed, and said that the sea does not read calendars.

A matrix is invertible if and only if its determinant is not zero. Suppose that A has 3 rows and 3 columns, and that the
second is twice the first: then det A = 0, and Ax = b has either no solution or infinitely many of them.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("mean of nothing")
    total = 0.0
    for i, x in enumerate(values):
        total += x  # rounding errors add up, too
    return total / len(values)

{"name": "harbour", "open": true, "depth": [3.5, 4.25, 12], "since": "1987-06-03"}

How do I boil an egg? 1. Bring water to the boil. 2. Lower the egg into it with a spoon. 3. Wait for six to eight minutes.
Then put it into cold water, so that it can be peeled.

Im Winter fährt der letzte Zug um 21:40 Uhr. La bibliothèque ferme à dix-huit heures, sauf le dimanche. El río nace en la
montaña y llega al mar después de 300 kilómetros. 今日は天気がいいから、散歩しましょう。 Завтра будет дождь.

In 2019 the committee published its report (see table 4): exports had fallen by 7%, while the price of copper, which many
had expected to rise, stayed where it was. Researchers at the university were less surprised than the newspapers.
"""
_TOKENS = 256


def sample_ids(program: Program) -> tuple[int, ...]:
    """The text's first tokens, by the model's tokenizer; none where it has none, or one that cannot be read."""
    from .quality import text_ids

    try:
        return tuple(itertools.islice(text_ids(program, SAMPLE), _TOKENS))
    except Exception:  # of whatever kind the tokenizers library raises: whoever needs the text says what is wrong with it
        return ()
