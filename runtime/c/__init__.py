"""An artifact as a project in C: its folder beside the sources of a host that runs it without Python.

The sources (``*.cc``, ``wasat.h``, ``generate.c``) are data of this package. The host reads the same manifest, feeds sessions
and samples as the modules above it do; the tests hold its tokens against theirs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..artifact import MANIFEST, TOKENIZER, check_above, read_manifest
from ..errors import ArtifactError, InputError
from ..manifest import Manifest

HERE = Path(__file__).parent
ARTIFACT, SOURCES, HEADERS = "artifact", "src", "include"


def check_place(out: Path) -> None:
    """Raises ArtifactError unless ``out`` is free, empty, or an exported folder, where it can be written."""
    check_above(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / SOURCES / "wasat.h").is_file() or not (out / ARTIFACT / MANIFEST).is_file():
        raise ArtifactError(f"{out} exists and is no exported C project; remove it or choose another place")


def check_manifest(m: Manifest, folder: Path) -> None:
    """Raises InputError for a program that the host does not run: it feeds one row of text."""
    if m.target.kind != "llvm":
        raise InputError(f"{folder} is compiled for {m.target.device}: the C host runs programs for CPUs")
    if not {"prefill", "decode"} <= m.entries.keys():
        why = f", because {m.no_cache}" if m.no_cache else ""
        raise InputError(f"{folder} has no entries prefill and decode{why}: the C host generates text, and needs caches for it")
    encode = m.entries.get("encode")
    media = {"media", "seen"} if m.interface.media else set()
    if encode and media and {i.name for i in encode.inputs} <= media:
        media |= {o.name for o in encode.outputs}
    for name in ("prefill", "decode"):
        entry = m.entries[name]
        if beyond := [i.name for i in entry.inputs if i.name not in {m.interface.tokens, "past", "last", *media}]:
            raise InputError(f"the model takes more than tokens ({', '.join(beyond)}): the C host feeds text alone")
        rows = next(i.shape[0] for i in entry.inputs if i.name == m.interface.tokens)
        if isinstance(rows, int) and rows != 1:
            raise InputError(f"the program is for {rows} rows: the C host runs one; export with a symbolic number of rows")


def check_tokenizer(path: Path) -> None:
    """Raises InputError, naming each, for parts of a tokenizer that the host does not have."""
    beyond = sorted(set(unknown_parts(json.loads(path.read_text(encoding="utf-8")))))
    if beyond:
        raise InputError(f"{path}: the C host's tokenizer lacks {', '.join(beyond)}; without {TOKENIZER} it takes token ids")


_KNOWN = {
    "model": "BPE Unigram WordPiece WordLevel",
    "normalizer": "Sequence NFC NFD NFKC NFKD Lowercase StripAccents ByteLevel Strip Prepend Replace BertNormalizer",
    "pre_tokenizer": "Sequence Split ByteLevel Metaspace BertPreTokenizer Whitespace WhitespaceSplit CharDelimiterSplit Digits "
                     "Punctuation",
    "post_processor": "Sequence ByteLevel TemplateProcessing BertProcessing RobertaProcessing",
    "decoder": "Sequence ByteLevel Replace ByteFallback Fuse Strip Metaspace WordPiece BPEDecoder",
}  # fmt: skip
_INNER = ("normalizers", "pretokenizers", "processors", "decoders")
_CATEGORIES = r"\^?(?:Cn|L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfo])\}"
_ODD = re.compile(rf"\\[pP]\{{(?!{_CATEGORIES})[^}}]*\}}|&&|\[\[:\w+|\\[1-9kgGKXRbBhHZ]|\(\?[^:=!<i)]|\(\?<[^=!]")
"""What regular expressions may hold and the host's do not know."""


def unknown_parts(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """What of a tokenizer.json the host does not know, in words."""
    for kind, known in _KNOWN.items():
        if (part := tokenizer.get(kind)) is not None:
            yield from _unknown(kind, known.split(), part)
    if (tokenizer.get("model") or {}).get("dropout"):
        yield "dropout"


def _unknown(kind: str, known: list[str], part: Mapping[str, Any]) -> Iterator[str]:
    type_ = part.get("type")
    if type_ not in known and not (kind == "model" and type_ is None):
        yield f"the {kind} {type_}"
    for inner in _INNER:
        for item in part.get(inner) or ():
            yield from _unknown(kind, known, item)
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and (odd := _ODD.search(pattern.get("Regex", ""))):
        yield f"{odd[0]} in regular expressions"


def write_project(artifact: Path, out: Path, move: bool = False) -> None:
    """Writes the project of ``artifact`` at ``out``, where one may lie already. ``move``: the artifact's files need not stay.

    Raises InputError for a model or tokenizer that the host does not run, ArtifactError for a place that holds something else.
    """
    check_place(out)
    manifest = read_manifest(artifact, here=False)
    check_manifest(manifest, artifact)
    if TOKENIZER in manifest.files:
        check_tokenizer(artifact / TOKENIZER)
    if artifact.resolve() == (out / ARTIFACT).resolve():
        raise ArtifactError(f"{artifact} is the artifact of {out} itself: export it to another place")
    out.mkdir(parents=True, exist_ok=True)
    for name in (ARTIFACT, SOURCES, HEADERS):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (ARTIFACT, SOURCES):
        (out / name).mkdir()
    for name in (*manifest.files, MANIFEST):
        (shutil.move if move else shutil.copyfile)(artifact / name, out / ARTIFACT / name)
    for path in HERE.iterdir():
        if path.suffix in (".h", ".cc", ".c", ".inc"):
            shutil.copyfile(path, out / SOURCES / path.name)
    for name in ("CMakeLists.txt", "README.md"):
        shutil.copyfile(HERE / name, out / name)
    import tvm_ffi

    root = Path(tvm_ffi.__file__).parent / "include"
    for name in ("tvm", "dlpack"):
        shutil.copytree(root / name, out / HEADERS / name)
