"""What exporters leave beside tokens is derived from them; what cannot be is named, and the graph stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import IRError, evaluate
from wasat.passes import PassError, PassManager, TokenInputs

import wasat as ws
from wasat.testing import random_program

BEFORE = """graph @forward(%input_ids: i32[b, s], %attention_mask: f32[n, p + s], %position_ids: i64[1, m], \
%cache_position: i64[s], %past_key_values.0.key: f32[b, p, 4], %state: f32[b, 4]) {
  param %table: f32[9, 4]
  %x: f32[b, s, 4] = gather(%table, %input_ids) {axis=0}
  %keys: f32[b, p + s, 4] = concat(%past_key_values.0.key, %x) {axis=1}
  %whole: f32[b, p + s] = broadcast_to(%attention_mask) {shape=(b, p + s)}
  %m: f32[b, p + s, 1] = reshape(%whole) {shape=(b, p + s, 1)}
  %masked: f32[b, p + s, 4] = mul(%keys, %m)
  %both: i64[1, m] = add(%position_ids, %cache_position)
  %at: f32[1, m] = cast(%both) {dtype=f32}
  %place: f32[1, m, 1] = reshape(%at) {shape=(1, m, 1)}
  %new: f32[b, s, 4] = slice(%masked) {starts=(0, p, 0), stops=(b, p + s, 4)}
  %y: f32[b, s, 4] = add(%new, %place)
  %add: f32[b, 1, 4] = reshape(%state) {shape=(b, 1, 4)}
  %logits: f32[b, s, 4] = add(%y, %add)
  return logits=%logits, "present.0.key"=%keys
}
"""


def test_only_tokens_stay() -> None:
    old, new = random_program(BEFORE), random_program(BEFORE)
    report = PassManager([TokenInputs()]).run(new)
    g = new["forward"]
    assert [(v.name, str(v.type)) for v in g.inputs] == [("tokens", "i64[b, s]"), ("state", "f32[b, 4]")]
    assert g.output_names == ["logits"]
    assert [r.message for r in report.remarks("applied")] == [
        "input %attention_mask: all ones", "input %position_ids: 0, 1, ..", "input %cache_position: 0, 1, ..",
        "input %past_key_values.0.key: empty: caches are derived, not taken over",
    ]  # fmt: skip
    tokens, state = np.array([[3, 1, 4], [1, 5, 8]]), np.ones((2, 4), np.float32)
    feeds = {
        "input_ids": tokens.astype(np.int32), "attention_mask": np.ones((2, 3), np.float32), "state": state,
        "position_ids": np.arange(3)[None], "cache_position": np.arange(3),
        "past_key_values.0.key": np.zeros((2, 0, 4), np.float32),
    }  # fmt: skip
    params = {k: p.load() for k, p in old.params.items()}
    want = evaluate(old["forward"], feeds, params)[0]
    (got,) = evaluate(g, {"tokens": tokens, "state": state}, params)
    assert (got == want).all()


REFUSED = {
    "another input along s": (("%state: f32[b, 4]", "%state: f32[b, 4], %segments: i64[b, s]"),
                              "input %segments: i64[b, s] also has an element for each token"),
    "two outputs": (("return logits", "return hidden=%y, logits"), "it has 2 outputs (hidden, logits)"),
    "caches of two lengths": (("%state: f32[b, 4]", "%state: f32[b, 4], %past_key_values.0.value: f32[b, e, 4]"),
                              "its caches have several lengths: e, p"),
    "a mask of fixed length": (("%state: f32[b, 4]", "%state: f32[b, 4], %decoder_attention_mask: i64[b, 7]"),
                               "%decoder_attention_mask is i64[b, 7], beside %input_ids"),
    "an encoder's tokens as many as the decoder's": (
        ("%state: f32[b, 4]", "%state: f32[b, 4], %decoder_input_ids: i64[b, s]"),
        "input %input_ids: i32[b, s], %attention_mask: f32[n, p + s] also has an element for each token"),
    "an output of one length only": (("%new: f32[b, s, 4] = slice(%masked) {starts=(0, p, 0), stops=(b, p + s, 4)}",
                                      "%new: f32[b, s, 4] = slice(%masked) {starts=(0, 1, 0), stops=(b, 1 + s, 4)}"),
                                     "slice"),
}  # fmt: skip


@pytest.mark.parametrize("edit, reason", REFUSED.values(), ids=REFUSED)
def test_refused(edit: tuple[str, str], reason: str) -> None:
    assert edit[0] in BEFORE
    text = BEFORE.replace(*edit)
    program = random_program(text)
    with pytest.raises(IRError) as e:
        PassManager([TokenInputs()]).run(program)
    assert reason in str(e.value)
    report = PassManager([TokenInputs(required=False)]).run(program)
    assert str(program) == str(random_program(text))
    assert "@forward cannot be fed tokens alone: " in report.remarks("missed")[0].message


def test_a_fixed_number_of_tokens() -> None:
    text = "graph @forward(%input_ids: i64[b, 7]) {\n  %y: i64[b, 7] = neg(%input_ids)\n  return %y\n}\n"
    with pytest.raises(IRError, match="the number of tokens is fixed"):
        PassManager([TokenInputs()]).run(random_program(text))
    with pytest.raises(PassError, match="there is no graph @other"):
        PassManager([TokenInputs("other")]).run(random_program(text))


def test_tokens_of_another_type_are_i64() -> None:
    text = """graph @forward(%tokens: i32[b, s]) {
  param %table: f32[9, 4]
  %x: f32[b, s, 4] = embedding(%table, %tokens)
  return %x
}"""
    program = random_program(text)
    PassManager([TokenInputs()]).run(program)
    assert [str(v.type) for v in program["forward"].inputs] == ["i64[b, s]"]
    assert not PassManager([TokenInputs(required=False)]).run(random_program(text.replace("i32", "i64"))).steps[0].modified


@pytest.mark.parametrize("segments, runs", [("", 2), (", %segments: i64[b, s]", 1)], ids=["looks ahead", "another input"])
def test_the_pipeline_runs_again_only_for_inputs_that_went(
    segments: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Where no cache can be derived the inputs are as they were, and it is said why."""
    text = f"""graph @forward(%input_ids: i64[b, s], %attention_mask: i64[b, s]{segments}) {{
  param %table: f32[9, 4]
  %x: f32[b, s, 4] = embedding(%table, %input_ids)
  %m: f32[b, s] = cast(%attention_mask) {{dtype=f32}}
  %c: f32[b, s, 1] = reshape(%m) {{shape=(b, s, 1)}}
  %y: f32[b, s, 4] = mul(%x, %c)
  %z: f32[b, 4] = reduce_sum(%y) {{axes=(1,)}}
  return %z
}}"""
    program, run, seen = random_program(text), PassManager.run, list[str]()
    monkeypatch.setattr(PassManager, "run", lambda self, p: seen.append("") or run(self, p))
    served, report = ws.optimize(program)
    assert len(seen) == runs
    plain, other = ws.optimize(program, kv_cache=False)
    assert str(served) == str(plain)
    assert [s.name for s in report.steps[-2:]] == ["token-inputs", "derive-kv-cache"]
    said = [str(r) for s in report.steps[:-2] for r in s.remarks]
    assert said == [str(r) for s in other.steps for r in s.remarks]
    assert any("missed" in str(r.kind) for r in report.steps[-1].remarks)


MEMORY = """graph @forward(%decoder_input_ids: i64[b, s], %encoder_hidden_states: f32[b, t, 4], %attention_mask: i64[n, t]) {
  param %table: f32[9, 4]
  %q: f32[b, s, 4] = embedding(%table, %decoder_input_ids)
  %i: i64[b] = iota() {size=b}
  %m: i64[b, t] = gather(%attention_mask, %i)
  %o: bool[b, t] = greater(%m, 0:i64)
  %f: f32[b, t] = select(%o, 0.0:f32, -inf:f32)
  %r: f32[b, 1, t] = reshape(%f) {shape=(b, 1, t)}
  %kt: f32[b, 4, t] = transpose(%encoder_hidden_states) {perm=(0, 2, 1)}
  %p: f32[b, s, t] = matmul(%q, %kt)
  %a: f32[b, s, t] = add(%p, %r)
  %w: f32[b, s, t] = softmax(%a) {axis=2}
  %y: f32[b, s, 4] = matmul(%w, %encoder_hidden_states)
  return %y
}"""


def test_the_mask_of_a_memory_is_no_mask_of_the_tokens() -> None:
    """It is as long as the memory, and stays, for as many rows as there are: exporters give those a name of their own."""
    program = random_program(MEMORY)
    PassManager([TokenInputs()]).run(program)
    assert [(v.name, str(v.type)) for v in program["forward"].inputs] == [
        ("tokens", "i64[b, s]"), ("encoder_hidden_states", "f32[b, t, 4]"), ("attention_mask", "i64[b, t]"),
    ]  # fmt: skip


def test_the_mask_of_the_other_text_has_its_rows() -> None:
    """An encoder's tokens and their mask stay inputs, with one number of rows."""
    text = MEMORY.replace("%encoder_hidden_states: f32[b, t, 4]", "%input_ids: i64[b, t]").replace(
        "  %i: i64[b]", "  %encoder_hidden_states: f32[b, t, 4] = embedding(%table, %input_ids)\n  %i: i64[b]")  # fmt: skip
    program = random_program(text)
    PassManager([TokenInputs()]).run(program)
    assert {v.name: str(v.type) for v in program["forward"].inputs} == {
        "tokens": "i64[b, s]", "input_ids": "i64[b, t]", "attention_mask": "i64[b, t]",
    }  # fmt: skip
    served, _ = ws.optimize(random_program(text), kv_cache=True)
    assert sorted(served.graphs) == ["decode", "encode", "prefill"]
