"""GGUF files that are damaged, cut short or made to do harm: a sentence, at once, and never a read outside the file."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from gguf_files import sentencepiece_vocabulary, write
from wasat.frontend import CheckpointError
from wasat.frontend.gguf import from_gguf
from wasat.frontend.weights.gguf import read_gguf
from wasat.ir import WasatError

HUGE = [2**64 - 1, 2**63, 2**63 - 1, 2**62 + 5, 2**32, 2**31, 10**9]


def string(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if rank is None else rank, *dims, kind, offset)


def file(
    entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 4096, *, version: int = 3,
    counts: tuple[int, int] | None = None, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    n, m = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, n, m) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\1" * data


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "other file": (b"PK\3\4" + b"\0" * 100, "is no GGUF file"),
    "magic only": (b"GGUF", "truncated or damaged"),
    "version 1": (file(version=1), "GGUF of version 1"),
    "version 9": (file(version=9), "GGUF of version 9"),
    "big endian": (file(version=3 << 24), "big-endian"),
    "half a string": (file((entry("abc", 8, struct.pack("<Q", 50000)),)), "the length of abc would be 50,000"),
    "key of no bytes": (file(counts=(0, 10**6), data=0), "number of metadata entries would be 1,000,000"),
    "no utf-8": (file((entry("k", 8, string(b"\xff\xfe")),)), "k is no UTF-8"),
    "unknown type": (file((entry("k", 77, b"\0" * 8),)), "k is of type 77"),
    "array of arrays": (file((entry("k", 9, struct.pack("<IQ", 9, 1)),)), "array of type 9"),
    "key twice": (file((entry("k", 4, b"\0" * 4), entry("k", 4, b"\0" * 4))), "k is given twice"),
    "tensor twice": (file((), (tensor(), tensor(offset=128))), "tensor t is given twice"),
    "no axes": (file((), (tensor(dims=()),)), "has 0 axes"),
    "many axes": (file((), (tensor(rank=5, dims=(2,) * 5),)), "has 5 axes"),
    "rank that lies": (file((), (tensor(rank=2**31),)), "has 2147483648 axes"),
    "empty axis": (file((), (tensor(dims=(32, 0)),)), r"would be \[0, 32\]"),
    "product past 64 bits": (file((), (tensor(dims=(2**32, 2**32, 4)),)), "tensor t would be"),
    "product that wraps to little": (file((), (tensor(dims=(2**32, 2**31 + 1, 2)),)), "tensor t would be"),
    "larger than the file": (file((), (tensor(dims=(1025,)),)), "tensor t ends at"),
    "one byte short": (file((), (tensor(dims=(1024,)),), data=4095), "tensor t ends at"),
    "offset outside": (file((), (tensor(offset=2**20),)), "tensor t ends at"),
    "offset that wraps": (file((), (tensor(offset=2**64 - 32),)), "tensor t ends at"),
    "offset not aligned": (file((), (tensor(offset=4),)), "no multiple of 32"),
    "overlap": (file((), (tensor(dims=(64,)), tensor("u", offset=128))), "tensors t and u overlap"),
    "a little overlap": (file((), (tensor(dims=(64,)), tensor("u", offset=224))), "tensors t and u overlap"),
    "removed type": (file((), (tensor(kind=4),)), "of type 4, which GGUF does not have"),
    "type not known": (file((), (tensor(kind=9999),)), "of type 9999"),
    "type not read": (file((), (tensor(dims=(256,), kind=16),)), "tensor t is IQ2_XXS; what can be read is F32"),
    "no whole blocks": (file((), (tensor(dims=(33,), kind=8),)), "no whole blocks of 32"),
    "alignment 0": (file((entry("general.alignment", 4, struct.pack("<I", 0)),), (tensor(),)), "alignment is 0"),
    "alignment 24": (file((entry("general.alignment", 4, struct.pack("<I", 24)),), (tensor(),)), "alignment is 24"),
    "alignment 2**31": (file((entry("general.alignment", 4, struct.pack("<I", 2**31)),), (tensor(),)), "alignment is"),
    "alignment of text": (file((entry("general.alignment", 8, string("x")),), (tensor(),)), "alignment is 'x'"),
}  # fmt: skip
for n in HUGE:
    CASES[f"{n} entries"] = (file(counts=(0, n)), "the number of metadata entries would be")
    CASES[f"{n} tensors"] = (file(counts=(n, 0)), "the number of tensors would be")
    CASES[f"key of {n}"] = (file((struct.pack("<Q", n) + b"abc",)), "the length of the name of metadata entry 0 would be")
    CASES[f"string of {n}"] = (file((entry("k", 8, struct.pack("<Q", n)),)), "the length of k would be")
    CASES[f"{n} numbers"] = (file((entry("k", 9, struct.pack("<IQ", 6, n)),)), "the length of k would be")
    CASES[f"{n} strings"] = (file((entry("k", 9, struct.pack("<IQ", 8, n)),)), "the length of k would be")
    CASES[f"name of {n}"] = (file((), (struct.pack("<Q", n) + b"t",)), "the length of the name of tensor 0 would be")


@pytest.mark.parametrize("name", CASES)
def test_damaged(name: str, tmp_path: Path) -> None:
    data, message = CASES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as e:
        read_gguf(path)
    assert str(path) in str(e.value)


def test_a_file_that_is_well(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    bits = np.array([1, 0, 1], np.uint8).tobytes()
    path.write_bytes(file(
        (entry("a", 7, b"\1"), entry("b", 9, struct.pack("<IQ", 7, 3) + bits), entry("c", 11, struct.pack("<q", -5)),
         entry("d", 9, struct.pack("<IQ", 8, 2) + string("x") + string("é")), entry("e", 12, struct.pack("<d", 0.5))),
        (tensor(dims=(32, 2), kind=1), tensor("u", dims=(3,), offset=128)),
    ))  # fmt: skip
    g = read_gguf(path)
    assert (g.metadata["a"], g.metadata["b"].tolist(), g.metadata["c"]) == (True, [True, False, True], -5)
    assert (g.metadata["d"], g.metadata["e"]) == (["x", "é"], 0.5)
    assert {n: str(t.type) for n, t in g.tensors.items()} == {"t": "f16[2, 32]", "u": "f32[3]"}


def whole(path: Path) -> bytes:
    write(path, "llama", kinds=lambda name: "Q5_0", tokenizer="llama", keys={"rope.scaling.type": "none"})
    return path.read_bytes()


def read_all(path: Path) -> None:
    """All that opening and packing would read."""
    program = from_gguf(path)
    for name in program.params:
        program.load(name)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = whole(tmp_path / "whole.gguf")
    path = tmp_path / "m.gguf"
    for n in [*range(0, 200), *np.random.default_rng(0).integers(200, len(data), 100)]:
        path.write_bytes(data[:n])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def changes(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(4, header))
        how: list[Callable[[], bytes]] = [
            lambda: bytes(rng.integers(0, 256, 1, np.uint8)), lambda: bytes(rng.integers(0, 256, 8, np.uint8)),
            lambda: struct.pack("<Q", HUGE[int(rng.integers(len(HUGE)))]), lambda: b"\0" * 8, lambda: b"\xff" * 4,
        ]  # fmt: skip
        new = how[int(rng.integers(len(how)))]()
        out[at : at + len(new)] = new
    return bytes(out)


def test_random_damage(tmp_path: Path) -> None:
    """Nothing but a sentence; and no more memory than the file's own size asks for."""
    data = whole(tmp_path / "whole.gguf")
    header = min(t.offset for t in read_gguf(tmp_path / "whole.gguf").tensors.values())
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    before, well, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for i in range(150):
        path.write_bytes(changes(data, rng, 1200 if i % 2 else header))  # the sizes stand at the front
        try:
            read_all(path)
            well += 1
        except WasatError as e:
            longest = max(longest, len(str(e)))
    assert well < 120
    assert longest < 4000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("value", [[1, 2, 3], ["a"]], ids=["numbers", "texts"])
@pytest.mark.parametrize("key", [
    "general.type", "general.name", "general.quantization_version", "expert_count", "pooling_type", "model", "pre",
    "bos_token_id", "add_bos_token", "merges",
])  # fmt: skip
def test_a_list_where_one_value_belongs(key: str, value: list[object], tmp_path: Path) -> None:
    """Arrays compare element by element, and are no keys of a table."""
    path, kind = tmp_path / "m.gguf", "gpt2" if key in ("pre", "merges") else "llama"
    of_model = key.startswith("general.") or key in ("expert_count", "pooling_type")
    write(path, "llama", tokenizer=kind, **{"keys" if of_model else "tokens": {key: value}})
    if key == "general.name":
        assert from_gguf(path).interface.name == "m"
        return
    with pytest.raises(WasatError, match="of kind" if key == "model" else key):
        from_gguf(path)


def test_a_token_of_many_letters(tmp_path: Path) -> None:
    """Not each of its beginnings is looked up, only those as long as some token."""
    path, names = tmp_path / "m.gguf", sentencepiece_vocabulary()[0]
    write(path, "llama", tokenizer="llama", tokens={"tokens": [*names[:-1], "a" * 300_000]})
    begun = time.process_time()
    merges = json.loads(from_gguf(path).origin.texts["tokenizer.json"])["model"]["merges"]
    assert time.process_time() - begun < 2
    assert ["▁t", "h"] in merges


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    for arch, layers in (("llama", 4096), ("gemma3", 2**32 - 1)):
        write(tmp_path / "m.gguf", arch, keys={"block_count": layers})
        begun = time.process_time()
        with pytest.raises(WasatError, match=rf"{arch}\.block_count is {layers:,}, and the file has \d+ tensors"):
            from_gguf(tmp_path / "m.gguf")
        assert time.process_time() - begun < 1


# -- split files --------------------------------------------------------------------------------------------------------------
def split(tmp_path: Path, **changes: int) -> Path:
    for i in range(2):
        keys = {"split.no": i, "split.count": 2, "split.tensors.count": 3, **(changes if i else {})}
        entries = tuple(entry(k, 4, struct.pack("<I", v)) for k, v in keys.items())
        tensors = (tensor("a"),) if i == 0 else (tensor("b"), tensor("c", offset=128))
        (tmp_path / f"m-{i + 1:05}-of-00002.gguf").write_bytes(file(entries, tensors))
    return tmp_path


@pytest.mark.parametrize("named", [1, 2])
def test_parts_are_one_model(named: int, tmp_path: Path) -> None:
    g = read_gguf(split(tmp_path) / f"m-{named:05}-of-00002.gguf")
    assert {n: t.file.name for n, t in g.tensors.items()} == {
        "a": "m-00001-of-00002.gguf", "b": "m-00002-of-00002.gguf", "c": "m-00002-of-00002.gguf",
    }  # fmt: skip
    assert g.metadata["split.no"] == 0  # the first part has the model's metadata


def test_parts_that_are_none(tmp_path: Path) -> None:
    first = split(tmp_path) / "m-00001-of-00002.gguf"
    other = tmp_path / "other.gguf"
    other.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="one of 2 parts of a model; name them as they were"):
        read_gguf(other)
    split(tmp_path, **{"split.no": 0})
    with pytest.raises(CheckpointError, match="does not say that it is part 2 of 2"):
        read_gguf(first)
    split(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(first.read_bytes().replace(b"split.no\4\0\0\0\0", b"split.no\4\0\0\0\1"))
    with pytest.raises(CheckpointError, match="tensors that an earlier part has too: a"):
        read_gguf(first)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf is missing"):
        read_gguf(first)
