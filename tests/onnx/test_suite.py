"""The ONNX backend suite's node tests on the interpreter, against the list of those that fail, which only shrinks."""

from __future__ import annotations

from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
if not onnx.__version__.startswith("1.23."):
    pytest.skip(f"the list is of onnx 1.23, not {onnx.__version__}", allow_module_level=True)

from report import DOCUMENT, LIST, document
from suite import expected_failures, is_listed, node_tests, run_test
from wasat.frontend.onnx import OnnxError

TESTS = node_tests()
EXPECTED = expected_failures(LIST)


@pytest.mark.parametrize("test", TESTS, ids=[t.name for t in TESTS])
@pytest.mark.filterwarnings("ignore")
def test_node(test: Any) -> None:
    try:
        run_test(test)
    except Exception as e:
        if test.name not in EXPECTED or not is_listed(LIST, test.name, e):
            raise
        pytest.xfail(f"{EXPECTED[test.name]}: {e}")
    assert test.name not in EXPECTED, "it passes now: take it off tests/onnx/expected_failures.txt and run tests/onnx/report.py"


def test_the_list_names_tests_of_the_suite() -> None:
    assert EXPECTED.keys() <= {t.name for t in TESTS}
    assert len(TESTS) - len(EXPECTED) >= 0.95 * len(TESTS)


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/onnx/report.py"


def test_another_error_is_not_the_listed_one() -> None:
    name = "test_string_concat"
    assert is_listed(LIST, name, OnnxError("these operators are not supported:\n  StringConcat: 1 (result)"))
    assert not is_listed(LIST, name, OnnxError("the file is damaged"))
    assert not is_listed(LIST, name, KeyError("StringConcat: 1"))
