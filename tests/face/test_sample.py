"""The text over which features are measured where none is given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import wasat as ws
from wasat.sample import sample_ids

PYGEMMA = Path(__file__).parents[2] / "examples" / "pygemma"


def test_a_model_with_a_tokenizer_reads_it() -> None:
    program = ws.from_pretrained(PYGEMMA)
    ids = sample_ids(program)
    assert (len(ids), len(set(ids)) > 100, max(ids) < 2048) == (256, True, True)
    _, report = ws.optimize(program, quantize="int8", kv_cache=False)
    [said] = [r.message for r in report.remarks("applied") if "inputs of products" in r.message]
    assert re.fullmatch(r"features of \d inputs of products are made one size; those of \d\d are even", said), said


def test_without_a_tokenizer_it_is_no_text(tmp_path: Path) -> None:
    program = ws.from_pretrained(PYGEMMA)
    program.origin = replace(program.origin, tokenizer=None, texts={})
    assert sample_ids(program) == ()
    (tmp_path / "tokenizer.json").write_text("{")
    program.origin = replace(program.origin, tokenizer=str(tmp_path / "tokenizer.json"))
    assert sample_ids(program) == ()
