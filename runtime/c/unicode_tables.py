"""Writes unicode_tables.inc: what the tokenizers library takes characters for, asked of the library itself.

Its parts know different versions of Unicode (Oniguruma's, Rust's, those of older packages): no table of Python's would do.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
CATEGORIES = [
    "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
    "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co",
]  # fmt: skip
_ALL = "".join(map(chr, POINTS))


def matched(pattern: str) -> set[int]:
    """The characters that a class of Oniguruma's has."""
    left = pre_tokenizers.Split(Regex(pattern + "+"), "removed").pre_tokenize_str(_ALL)
    return set(POINTS) - {POINTS[i] for _, (start, end) in left for i in range(start, end)}


def bounds(members: Iterable[int]) -> list[int]:
    """Where membership changes."""
    found: list[int] = []
    previous = -2
    for c in sorted(members):
        if c != previous + 1:
            found += [previous + 1, c] if found else [c]
        previous = c
    return [*found, previous + 1] if found else []


def runs(value: Callable[[int], int], shift: int) -> list[int]:
    """start << shift | value, of each run of equal values."""
    found: list[int] = []
    for c in range(0x110000):
        v = value(c)
        if not found or found[-1] & ((1 << shift) - 1) != v:
            found.append(c << shift | v)
    return found


def isolated(splitter: pre_tokenizers.PreTokenizer) -> tuple[set[int], set[int]]:
    """The characters that a pre-tokenizer sets apart from letters, and those it removes between them."""
    apart, removed = set(), set()
    for c in POINTS:
        pieces = [p for p, _ in splitter.pre_tokenize_str(f"a{chr(c)}a")]
        if pieces == ["a", "a"]:
            removed.add(c)
        elif len(pieces) > 1:
            apart.add(c)
    return apart, removed


def mapped(normalize: Callable[[str], str], skip: Callable[[int], bool]) -> dict[int, str]:
    return {c: made for c in POINTS if not skip(c) and (made := normalize(chr(c))) != chr(c)}


def combining(nfd: Callable[[str], str], marks: set[int]) -> dict[int, int]:
    """Canonical combining classes: what a mark changes places with. The library's Unicode is older or newer than Python's."""
    known = {c: k for c in POINTS if (k := unicodedata.combining(chr(c)))}
    one_of = {k: c for c, k in reversed(known.items())}  # of each class, the character that is in Unicode for longest
    tilde = one_of[1]  # which goes before all others that the library knows
    one_of = {k: c for k, c in one_of.items() if k == 1 or nfd(f"a{chr(c)}{chr(tilde)}") != f"a{chr(c)}{chr(tilde)}"}
    found = {}
    for c in sorted({*known, *marks}):
        if nfd(chr(c)) == chr(c):
            above = [k for k, m in one_of.items() if nfd(f"a{chr(c)}{chr(m)}") != f"a{chr(c)}{chr(m)}"]  # it goes after these
            below = [k for k, m in one_of.items() if nfd(f"a{chr(m)}{chr(c)}") != f"a{chr(m)}{chr(c)}"]
            if above or below:
                (found[c],) = set(one_of) - {*above, *below} or {max(above) + 1}
    return found


def compositions(nfd: Callable[[str], str], nfc: Callable[[str], str], hangul: Callable[[int], bool]) -> list[int]:
    """first, second, composed."""
    found = {}
    for c in POINTS:
        whole = nfd(chr(c))
        if len(whole) > 1 and not hangul(c) and nfc(chr(c)) == chr(c):
            first = nfc(whole[:-1])
            assert len(first) == 1
            found[ord(first), ord(whole[-1])] = c
    return [x for pair, c in sorted(found.items()) for x in (*pair, c)]


def written(name: str, numbers: Iterable[int], kind: str = "uint32_t") -> str:
    lines, line = [], ""
    for n in numbers:
        item = f"{n:#x},"
        if len(line) + len(item) > 126:
            lines.append(line)
            line = ""
        line += item
    return f"const {kind} {name}[] = {{\n" + "\n".join([*lines, line]) + "\n};\n"


def table(name: str, items: dict[int, str]) -> str:
    """The keys, where the text of each begins in a pool, and the pool."""
    starts, pool = [], ""
    for made in items.values():
        starts.append(len(pool))
        pool += made
    return (
        written(f"{name}_KEYS", items) + written(f"{name}_STARTS", [*starts, len(pool)], "uint16_t")
        + written(f"{name}_POOL", map(ord, pool or "\0"), "char32_t")
    )  # fmt: skip


def main(path: Path) -> None:
    nfd, nfc, nfkd = (n.normalize_str for n in (normalizers.NFD(), normalizers.NFC(), normalizers.NFKD()))
    by_category = {c: i for i, name in enumerate(CATEGORIES) if name not in ("Cn", "Cs") for c in matched(rf"\p{{{name}}}")}

    def hangul(c: int) -> bool:
        return 0xAC00 <= c < 0xD7A4

    canonical = mapped(nfd, hangul)
    classes = combining(nfd, {c for c, i in by_category.items() if CATEGORIES[i][0] == "M"})
    cleaned = normalizers.BertNormalizer(True, False, False, False).normalize_str
    made = {c: cleaned(f"a{chr(c)}a") for c in POINTS}
    punctuation, space = isolated(pre_tokenizers.BertPreTokenizer())
    parts = isolated(pre_tokenizers.Whitespace())
    chinese = normalizers.BertNormalizer(False, True, False, False).normalize_str
    bert_accents = normalizers.BertNormalizer(False, False, True, False).normalize_str
    accents = normalizers.StripAccents().normalize_str
    path.write_text(
        "// Made by unicode_tables.py: do not edit.\n"
        + written("CATEGORY", runs(lambda c: by_category.get(c, 0), 5))
        + written("WORD", bounds(matched(r"\w")))
        + written("SPACE", bounds(matched(r"\s")))
        + written("RUST_WORD", bounds(set(POINTS) - parts[0] - parts[1]))
        + written("RUST_SPACE", bounds(parts[1]))
        + written("BERT_PUNCTUATION", bounds(punctuation))
        + written("BERT_SPACE", bounds(space))
        + written("BERT_REMOVED", bounds(c for c, x in made.items() if x == "aa"))
        + written("BERT_BLANK", bounds(c for c, x in made.items() if x == "a a"))
        + written("BERT_CHINESE", bounds(c for c in POINTS if chinese(chr(c)) != chr(c)))
        + written("PUNCTUATION", bounds(isolated(pre_tokenizers.Punctuation())[0]))
        + written("DIGIT", bounds(isolated(pre_tokenizers.Digits())[0]))
        + written("ACCENT", bounds(c for c in POINTS if not accents(chr(c))))
        + written("BERT_ACCENT", bounds(c for c in POINTS if not bert_accents(chr(c))))
        + written("COMBINING", runs(lambda c: classes.get(c, 0), 8))
        + written("COMPOSED", compositions(nfd, nfc, hangul))
        + table("CANONICAL", canonical)
        + table("COMPATIBLE", {c: x for c, x in mapped(nfkd, hangul).items() if canonical.get(c) != x})
        + table("LOWER", mapped(normalizers.Lowercase().normalize_str, lambda c: False)),
        encoding="ascii",
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("unicode_tables.inc"))
