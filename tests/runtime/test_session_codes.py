"""Sessions whose caches are codes: the same as the interpreter, over a program that rounds what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_session import (  # noqa: F401 - each test of these, on such caches
    test_any_chunking_gives_the_same_logits,
    test_caches_grow_and_keep_what_they_hold,
    test_padded_rows_equal_rows_alone,
    test_truncate_goes_back,
    test_truncate_refuses_what_a_ring_has_overwritten,
)
from test_session_rows import test_rows_are_as_if_alone, test_rows_without_tokens_stay_to_the_bit  # noqa: F401
from tiny_model import CONTEXT, STATES, Reference, tiny_program
from wasat.ir import Program
from wasat.passes import PassManager, QuantizeCaches
from wasat.runtime import Model, load

from wasat import driver


@pytest.fixture(scope="module", params=["int4"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(scheme: str) -> Program:
    made = tiny_program()
    PassManager([QuantizeCaches(scheme)]).run(made)
    return made


@pytest.fixture(scope="module")
def model(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    out = tmp_path_factory.mktemp("codes") / "model"
    driver.compile(program, out, kv_cache=False, passes="cleanup")
    return load(out)


def test_what_the_manifest_says(model: Model, scheme: str) -> None:
    """8 features and a scale are 10 bytes in int8; in int4 6 for a key, and 18 for a value, whose row is of 32 at least."""
    states = json.loads((Path(model.engine.folder) / "manifest.json").read_text())["states"]
    width = {"k": 10, "v": 18} if scheme == "int8" else {"k": 6, "v": 18}
    for s in states:
        capacity = "c" if s["name"].startswith("full") else 16
        assert (s["dtype"], s["shape"], s["stored"]) == ("int8", ["b", 1, capacity, width[s["role"]]], scheme)
    assert [s.stored for s in model.manifest.interface.states] == [scheme] * len(STATES)
    session = model.session(3)
    session._slots.reserve(CONTEXT)
    assert session._slots.nbytes == 3 * (width["k"] + width["v"]) * (CONTEXT + 16)


def test_rounding_is_not_nothing(model: Model, scheme: str) -> None:
    """What is compared above differs from what f32 would say, by about what the scheme loses."""
    tokens = [int(t) for t in np.random.default_rng(3).integers(0, 256, 24)]
    *_, want = Reference(tiny_program()).feed(tokens)
    session = model.session()
    for at in range(0, 24, 8):
        got = session.step([tokens[at : at + 8]])[0]
    error = np.abs(got - want).max() / np.abs(want).max()
    assert (1e-4 < error < 1e-2) if scheme == "int8" else (3e-3 < error < 0.2)
