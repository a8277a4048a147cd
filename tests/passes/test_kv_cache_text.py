"""The derivation of caches, in text: what it refuses by its options, how far tables reach, what it says and hands over."""

from __future__ import annotations

from typing import Any

import pytest
from wasat.ir import IRError, parse
from wasat.passes import DeriveKVCache, PassError, PassManager
from wasat.passes.analyses.axis import analyze
from wasat.passes.serving.kv_cache import _positions_known

from wasat.testing import random_program


@pytest.mark.parametrize("options, words", [
    ({"chunk": 0}, "chunk=0: a chunk holds at least one token"), ({"chunk": 1.5}, "chunk=1.5: a chunk"),
    ({"granule": 0}, "granule=0: a capacity is a multiple of at least one position"),
    ({"graph": "step"}, "there is no graph @step; there are @forward"),
])
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PassError, match=words):
        DeriveKVCache(**options).requires(random_program(RUNNING))
    DeriveKVCache(chunk=1, granule=1).requires(random_program(RUNNING))


RUNNING = """graph @forward(%ids: i64[b, s]) {
  param %table: f32[11, 8]
  %x: f32[b, s, 8] = embedding(%table, %ids)
  %y: f32[b, s, 8] = cumsum(%x) {axis=1}
  return %y
}"""


def known(lines: str) -> int | None:
    g = parse(f"graph @f(%ids: i64[b, s], %table: f32[16, 4]) {{\n  %at: i64[s] = iota() {{size=s}}\n  {lines}\n}}")
    return _positions_known(g, analyze(g, "s", g.inputs[0].shape[0]))


READ = "\n  %y: f32[s, 4] = embedding(%table, %p)\n  return %y"
PAIR = "%column: i64[s, 1] = reshape(%at) {shape=(s, 1)}\n  "


@pytest.mark.parametrize("lines, want", [
    ("%p: i64[s] = add(%at, 0:i64)" + READ, 16),
    ("%p: i64[s] = add(%at, 2:i64)" + READ, 14),
    ("%p: i64[s] = mul(%at, 2:i64)" + READ, 8),
    ("%p: i64[s] = mul(%at, 3:i64)" + READ, 6),
    ("%p: i64[s] = minimum(%at, 15:i64)" + READ, None),
    ("%p: i64[s] = sub(15:i64, %at)" + READ, None),
    ("%p: i64[s] = mul(%at, %at)" + READ, None),
    ("%z: i64[s] = mul(%at, 0:i64)\n  %p: i64[s] = add(%z, 20:i64)" + READ, None),
    (PAIR + "%p: i64[s, s] = add(%at, %column)\n  %y: f32[s, s, 4] = embedding(%table, %p)\n  return %y", 8),
    (PAIR + "%p: i64[s, s] = sub(%at, %column)\n  %y: f32[s, s, 4] = embedding(%table, %p)\n  return %y", 16),
    ("%y: f32[b, s, 4] = embedding(%table, %ids)\n  return %y", None),
    ("%p: i64[s] = add(%at, 1:i64)\n %a: f32[s, 4] = embedding(%table, %at)\n %b: f32[s, 4] = embedding(%table, %p)\n"
     "  %y: f32[s, 4] = add(%a, %b)\n  return %y", 15),
])
def test_for_how_many_positions_tables_have_rows(lines: str, want: int | None) -> None:
    assert known(lines) == want


@pytest.mark.parametrize("batch, donated", [("b", True), ("1", True), ("2", False)])
def test_states_are_donated_where_all_rows_are_called_for(batch: str, donated: bool) -> None:
    program = random_program(RUNNING.replace("[b,", f"[{batch},"))
    PassManager([DeriveKVCache()]).run(program)
    assert [s.donated for s in program.interface.states] == [donated]


BESIDE = """graph @forward(%ids: i64[b, s], %seen: f32[b, m, 8]) {
  param %table: f32[11, 8]
  %a: f32[b, 8] = reduce_mean(%seen) {axes=(1,)}
  %c: f32[b, 1, 8] = reshape(%a) {shape=(b, 1, 8)}
  %x: f32[b, s, 8] = embedding(%table, %ids)
  %z: f32[b, s, 8] = add(%x, %c)
  %y: f32[b, s, 8] = cumsum(%z) {axis=1}
  return %y
}"""


@pytest.mark.parametrize("keep", [True, False])
def test_what_needs_no_token_is_computed_once(keep: bool) -> None:
    program = random_program(BESIDE)
    remarks = PassManager([DeriveKVCache(keep=keep)]).run(program).remarks()
    assert list(program.graphs) == [*["forward"] * keep, "encode", "prefill", "decode"]
    assert [v.name for v in program["encode"].inputs] == ["seen"]
    assert [v.name for v in program["decode"].inputs] == ["ids", "past", "memory.0", "carry.0"]
    assert [r.message for r in remarks] == ["the carry of %y kept", "@encode computes 1 values once"]
    assert [str(v.type) for v in program["prefill"].outputs] == ["f32[b, 8]", "f32[b, 8]"]
    assert (program.interface.chunk, program.interface.context, program.interface.tokens) == (512, None, "ids")


def test_where_it_looks_ahead_the_graph_stays() -> None:
    text = RUNNING.replace("cumsum(%x) {axis=1}", "softmax(%x) {axis=1}")
    program = random_program(text)
    report = PassManager([DeriveKVCache(required=False)]).run(program)
    (remark,) = report.remarks("missed")
    assert remark.message.startswith("@forward stays as it is: no KV cache can be derived for output y: along s, %y: f32")
    assert not report.steps[0].modified
    assert list(program.graphs) == ["forward"]


LOSS = RUNNING.replace("return %y", "%loss: f32[8] = reduce_mean(%y) {axes=(0, 1)}\n  return %y, %loss")


def test_of_a_given_number_of_rows_what_is_no_number_is_not_taken_for_a_loss() -> None:
    program = random_program(LOSS)
    PassManager([DeriveKVCache()]).run(program)
    assert list(program["decode"].output_names) == ["y", "carry.0"]
    with pytest.raises(IRError, match="no KV cache can be derived for output loss"):
        PassManager([DeriveKVCache()]).run(random_program(LOSS.replace("[b,", "[2,")))


def test_one_loss_for_all_rows_is_left_off_with_what_it_alone_reads() -> None:
    text = RUNNING.replace("(%ids: i64[b, s]", "(%ids: i64[b, s], %targets: f32[b, s, 8]").replace("return %y", """
  %d: f32[b, s, 8] = sub(%y, %targets)
  %loss: f32[] = reduce_mean(%d) {axes=(0, 1, 2)}
  return %y, %loss""")
    program = random_program(text)
    remarks = PassManager([DeriveKVCache()]).run(program).remarks("missed")
    assert [r.message.partition(":")[0] for r in remarks] == ["output loss is not served"]
    assert "targets" not in [v.name for v in program["decode"].inputs]
    assert list(program["decode"].output_names) == ["y", "carry.0"]
