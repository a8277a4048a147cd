"""The parts of the host in C that need no TVM, with sanitizers, against Python: `make test-machines`."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from c_build import CHECKED, SOURCES, SYSTEM, program, shared
from tokenizer_files import KINDS, Texts
from tokenizers import Tokenizer as Library
from wasat.runtime.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.machines,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ (a package of Debian)"),
]


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that tests the parts, with sanitizers."""
    own = [s for s in SOURCES if s.stem not in ("session", "wasat")]  # what needs no TVM
    own.append(Path(__file__).with_name("c_host.cc"))
    return program(shared(tmp_path_factory) / "checked" / "parts", own, CHECKED, SYSTEM)


def test_numbers_are_numpys(checked: Path) -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1, *np.random.default_rng(0).integers(0, 2**63, 50).tolist()]
    found = answers(checked, [], "".join(f"r {s}\n" for s in seeds))
    for seed, line in zip(seeds, found):
        want = np.random.default_rng([seed, 0]).random(4).tolist()
        assert [float(x) for x in line.split()] == want


def answers(program: Path, arguments: Sequence[str], commands: str | bytes) -> list[str]:
    """A line for each command. Sizes before texts are left out."""
    given = commands.encode() if isinstance(commands, str) else commands
    done = subprocess.run([str(program), *arguments], input=given, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()[-3000:]
    return done.stdout.decode("utf-8", "surrogateescape").split("\n")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_librarys_tokens(checked: Path, tmp_path: Path, kind: str) -> None:
    library = KINDS[kind]()
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    texts = [x.encode() for x in (Texts(library, 1).text() for _ in range(400))]
    found = answers(checked, [str(path)], b"".join(b"e %d\n%s" % (len(x), x) for x in texts))
    for text, line in zip(texts, found):
        assert [int(t) for t in line.split()] == library.encode(text.decode()).ids, text.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_become_pythons_text(checked: Path, tmp_path: Path, kind: str) -> None:
    library: Library = KINDS[kind]()
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    ours, rng, texts = Tokenizer(path), random.Random(2), Texts(library, 2)
    sequences = []
    for _ in range(200):
        ids = library.encode(texts.text()).ids if rng.random() < 0.3 else []
        ids = ids or [rng.randrange(rng.choice((300, 703))) for _ in range(rng.randrange(1, 20))]
        sequences.append((ids, rng.randrange(len(ids) + 1)))
    commands = "".join(f"d {len(x)}\n{' '.join(map(str, x))}\ns {len(x)}\n{' '.join(map(str, x))} {n}\n" for x, n in sequences)
    done = subprocess.run([str(checked), str(path)], input=commands.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    rest = done.stdout

    def take() -> str:
        nonlocal rest
        size, _, rest = rest.partition(b" ")
        text, rest = rest[: int(size)].decode(), rest[int(size) + 1 :]
        return text

    for ids, given in sequences:
        assert take() == ours.decode(ids), ids
        stream = ours.stream(ids[:given])
        assert take() == "".join(stream.push(t) + "|" for t in ids[given:]) + stream.flush(), (ids, given)


def test_damaged_tokenizers_are_refused(checked: Path, tmp_path: Path) -> None:
    """Bytes changed at random: an answer or a message, never foreign memory."""
    rng, path = random.Random(5), tmp_path / "tokenizer.json"
    for kind in ("llama3", "llama2", "wordpiece", "unigram"):
        whole = KINDS[kind]().to_str().encode()
        for _ in range(6):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(min(len(data), rng.choice((3000, len(data)))))
                data[at : at + rng.randrange(1, 4)] = rng.choice(
                    (b"", b"1", b'"', b"null", b"[]", b"{", bytes([rng.randrange(256)]))
                )
            path.write_bytes(data)
            text = "hello wörld 👩‍👩‍👧 <tool> ab".encode()
            answers(checked, [str(path)], b"e %d\n%sd 3\n1 2 3\n" % (len(text), text))


def test_expressions_that_nest_without_end_are_refused(checked: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "tokenizer.json", json.loads(KINDS["llama3"]().to_str())
    for pattern in ("a" + "?" * 200_000, "a" + "{1,2}" * 100_000, "(" * 100_000):
        whole["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        path.write_text(json.dumps(whole))
        assert answers(checked, [str(path)], "")[0].startswith("refused")


def test_damaged_manifests_are_refused(checked: Path, copy: Path) -> None:
    """Values exchanged at random, the digest made anew: an answer or a message, never foreign memory."""
    rng, path = random.Random(6), copy / "manifest.json"
    whole = json.loads(path.read_text())
    odd = [
        None,
        -1,
        0,
        1,
        2**62,
        2**70,
        1.5,
        "",
        "c",
        "b",
        "c*c*c*c*c*c",
        "-(-1)//0",
        [],
        {},
        ["b", "c"],
        True,
        "../x",
        "float99",
    ]

    def places(x: Any) -> list[tuple[Any, Any]]:
        items = list(x.items()) if isinstance(x, dict) else list(enumerate(x)) if isinstance(x, list) else []
        return [(x, k) for k, _ in items] + [p for _, v in items for p in places(v)]

    from wasat.runtime.artifact import digest

    for _ in range(60):
        data = json.loads(json.dumps(whole))
        for _ in range(rng.randrange(1, 4)):
            where, key = rng.choice(places(data))
            where[key] = rng.choice(odd)
        path.write_text(json.dumps({**data, "digest": digest(data)}))
        answers(checked, [], f"m {len(str(copy))}\n{copy}")
    text = json.dumps(whole, separators=(",", ":"))
    for _ in range(20):
        at = rng.randrange(len(text))
        broken = text[:at] + rng.choice(['"', "", "{", "]", "\\u12", "1e", "-", "\x01"]) + text[at + rng.randrange(3) :]
        path.write_text(broken)
        (line, _) = answers(checked, [], f"m {len(str(copy))}\n{copy}")
        assert line.startswith("refused") == (broken != text)


def test_json_is_read_as_python_reads_it(checked: Path) -> None:
    good = [
        '{"a": [1, -2500.0, true, null, "\\u00e9\\ud83c\\udf89\\n\\u007f\x7fé"], "": {}}',
        "[]",
        "-Infinity",
        '"\\/"',
        "0",
        " {} ",
    ]
    bad = [
        "",
        "{",
        "[1,]",
        "01",
        "+1",
        "1.",
        ".5",
        "1e",
        "nul",
        '"\n"',
        '"\\x"',
        '"\\ud800"',
        '{"a":1,"a":2}',
        "[1] 2",
        "[" * 300,
        "'a'",
        '{"a" 1}',
        "{1: 2}",
        '"',
        "\ufeff1",
    ]
    for text in good:
        _, _, line = answers(checked, [], b"j %d\n%s" % (len(text.encode()), text.encode()))[0].partition(" ")
        assert line == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    for text in bad:
        assert answers(checked, [], b"j %d\n%s" % (len(text.encode()), text.encode()))[0].startswith("refused"), text
