"""The sampler of mutants: what it makes, and that a fault is tried in the copy, not in the tree."""
import ast
import subprocess
import sys
from os import environ

import mutants
import mutants_forked

SOURCE = '''def f(a, b):
    """é"""
    if not a < b:
        raise ValueError(f"{a + 1}")
    return min(a, 3) == 3 and True and a - b in {a, 'b'} and {a: b}
'''


def test_every_kind():
    made = mutants.mutants(SOURCE)
    for text in (
        "(a <= b)", "if (a < b)", "    pass\n    return", "(max(a, 3))", "(4)", "(2)", "!= 3)", "or True", "(False)",
        "(a + b)", "({a})", "({'b'})", "({})", "not in {",
    ):
        assert any(text in m for m in made), text
    assert len(made) == len(set(made)) == 16
    assert all("a + 1" in m or "pass" in m for m in made)
    assert all(ast.dump(ast.parse(m)) != ast.dump(ast.parse(SOURCE)) for m in made)


def test_of_some_lines():
    assert len(mutants.mutants(SOURCE, [3])) == 3
    assert mutants.mutants(SOURCE, [4]) == []


def test_the_lines_of_a_statement():
    assert mutants_forked.statement(SOURCE, SOURCE.replace("a < b", "a <= b")) == {3}
    assert mutants_forked.statement(SOURCE, SOURCE.replace("True", "False")) == {5}
    long = "def f(x):\n    while (x and\n           x > 1):\n        x = [\n            x,\n        ]\n"
    assert mutants_forked.statement(long, long.replace("x > 1", "x > 2")) == {2, 3}
    assert mutants_forked.statement(long, long.replace("    x,", "    y,")) == {4, 5, 6}
    assert mutants_forked.statement(long, long.replace("f(x)", "f(y)")) == {1}


def test_forks_notice_what_a_function_does_and_no_more(tmp_path):
    """A mutant that a test notices, one that none does, and one outside of functions, which has to be tried again. Only tests
    that reach a statement are tried with it, and none that fails of itself."""
    file, tests = "passes/analyses/cost.py", tmp_path / "test_it.py"
    tests.write_text(
        "from types import SimpleNamespace\n"
        "from wasat.passes.analyses import cost\n"
        "GIVEN = SimpleNamespace(node=None)\n"
        "def test_one(): assert cost.bytes_of(GIVEN, {}) == 0\n"
        "def test_another(): assert cost.bytes_of\n"
        "def test_broken(): assert cost.bytes_of(GIVEN, {}) == 1\n"
    )
    copied = mutants.farm(tmp_path, file)
    source = copied.read_text()
    name = "def bytes_of("
    assert source.count(name) == 1
    at = source.index("return", source.index(name))
    noticed = source[:at] + "return 77  # " + source[at:]
    same = source[:at] + "return  " + source[at + len("return "):]
    other = source.replace('"""', '"""Other. ', 1)
    tried = mutants.tried_in_forks(tmp_path, copied, [noticed, same, other], [str(tests)], 60)
    assert [x.killed for x in tried] == [True, False, None]
    assert [[t.rpartition("::")[2] for t in x.tests] for x in tried] == [["test_one"], ["test_one"], []]
    assert [mutants.outside(source, x) for x in (noticed, same, other)] == [False, False, True]


def test_the_tree_is_not_touched(tmp_path):
    file = "passes/analyses/rows.py"
    before = (mutants.ROOT / file).read_text()
    copied = mutants.farm(tmp_path, file)
    copied.write_text("raise RuntimeError('the mutant')\n")
    env = {**environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", "import wasat.passes.analyses.rows"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=mutants.ROOT)
    assert "the mutant" in ran.stderr
    assert (mutants.ROOT / file).read_text() == before


def test_what_covers_a_file_exists():
    for file in [*mutants.TESTS, "passes/training/remat.py"]:
        assert (mutants.ROOT / file).exists()
        assert all((mutants.ROOT / t.partition("::")[0]).exists() for t in mutants.covering(file)), file
