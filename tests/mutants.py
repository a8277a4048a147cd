"""Mutants: one small fault in a source file, and the tests that cover it. One that no test notices shows what is not tested.

    python tests/mutants.py passes/analyses/rows.py --seed 0 --count 40
    python tests/mutants.py passes/analyses/rows.py:31,40                  # every mutant that begins in these lines

Each is tried in a scratch copy of the packages (links, except for the file itself), first on the path: the tree is not touched.
"""
from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OPS = ("attention", "cache", "conv", "elementwise", "index", "linalg", "nn", "cond", "reduce", "rope", "scan", "shape", "unary")
ROOMS = ("ir", "passes", "backends", "frontend", "runtime", "training")
VALUES = ["tests/passes/test_core.py::test_passes_are_values"]
CACHES = [
    f"tests/passes/test_{x}.py" for x in ("kv_cache_text", "kv_cache", "kv_cache_refused", "rows", "kept", "kept_refused")
]
TESTS = {  # what covers a file; for others it is the file of the same name, or the room
    "frontend/models/encoders.py": ["tests/frontend/test_sentence.py"],
    "frontend/models/modernbert.py": ["tests/frontend/test_sentence.py"],
    "runtime/template.py": ["tests/runtime/test_templates.py"],
    "runtime/tokenizer.py": ["tests/runtime/test_text_stream.py", "tests/runtime/test_tokenizer.py"],
    "runtime/embedding.py": ["tests/runtime/test_embedding.py", "tests/face/test_embed.py"],
    "passes/analyses/rows.py": ["tests/passes/test_row_places.py", "tests/passes/test_rows.py"],
    **{f"passes/analyses/{x}.py": ["tests/passes/test_axis_labels.py", *CACHES] for x in ("axis", "sequence", "parts")},
    "passes/analyses/later.py": ["tests/passes/test_kept.py", "tests/passes/test_kept_refused.py"],
    "passes/serving/kept.py": ["tests/passes/test_kept.py", "tests/passes/test_kept_refused.py"],
    "passes/fusion/fuse_rope.py": ["tests/passes/test_fuse_rope.py", "tests/passes/test_fuse_rope_pairs.py"],
    "passes/serving/absorb.py": ["tests/passes/test_absorb.py"],
    "passes/analyses/mask.py": [
        "tests/passes/test_mask.py", "tests/passes/test_fuse_attention.py", "tests/passes/test_fuse_masks.py",
        "tests/passes/test_kv_cache.py", "tests/passes/test_kv_cache_refused.py",
    ],
    "passes/analyses/affine.py": [
        "tests/passes/test_indexing.py", "tests/passes/test_affine.py", "tests/passes/test_fuse_attention.py",
        "tests/passes/test_fuse_masks.py",
    ],
    "passes/analyses/indexing.py": [
        "tests/passes/test_indexing.py", "tests/passes/test_affine.py", "tests/passes/test_mask.py",
    ],
    "passes/analyses/labels.py": ["tests/passes/test_fuse_experts.py"],
    "passes/serving/folded.py": ["tests/passes/test_rows.py"],
    "passes/cleanup/rows_apart.py": ["tests/passes/test_fuse_experts.py"],
    "passes/fusion/stack_experts.py": ["tests/passes/test_fuse_experts.py"],
    "passes/cleanup/simplify_indices.py": ["tests/passes/test_affine.py"],
    "passes/analyses/factors.py": ["tests/passes/test_fuse_attention.py", "tests/passes/test_fuse_masks.py"],
    "passes/fusion/fuse_attention.py": [
        "tests/passes/test_fuse_attention.py", "tests/passes/test_fuse_masks.py", "tests/passes/test_near_patterns.py",
    ],
    "passes/fusion/fuse_norm.py": ["tests/passes/test_fuse_norm.py", "tests/passes/test_near_patterns.py"],
    **{f"passes/serving/{x}.py": [*CACHES, "tests/passes/test_kept_beside.py"] for x in ("kv_cache", "derivation")},
    "passes/cleanup/algebra.py": ["tests/passes/test_cleanup.py"],
    "passes/cleanup/clean_loops.py": ["tests/passes/test_clean_loops.py", "tests/passes/test_inference.py"],
    "passes/serving/inference.py": ["tests/passes/test_inference.py"],
    "passes/cleanup/hoist_params.py": ["tests/passes/test_hoist_params.py"],
    "passes/fusion/merge_linears.py": ["tests/passes/test_merge_linears.py"],
    "passes/training/precision.py": ["tests/passes/test_mixed_precision.py", "tests/training/test_precision.py"],
    "passes/training/autodiff.py": ["tests/passes/test_autodiff.py", "tests/passes/test_core.py"],
    "passes/training/remat.py": ["tests/passes/test_remat.py"],
    "backends/tvm/ops/indices.py": ["tests/face/test_edges.py"],
    "backends/tvm/ops/cond.py": ["tests/backends/test_compiled_cond.py"],
    "backends/tvm/ops/scan.py": ["tests/backends/test_compiled_scan.py"],
    "frontend/onnx/converters/control.py": ["tests/onnx/test_control.py"],
    **{f"backends/tvm/cpu/kernels/{x}.py": [f"tests/backends/test_kernels_{t}.py"] for x, t in (
        ("attention", "attention"), ("flash", "attention"), ("linear_float", "linear_float"), ("linear_int", "linear_int"),
        ("norm", "norm_glu"), ("glu", "norm_glu"), ("rope", "rope_cache"), ("cache", "rope_cache"),
    )},
    "backends/tvm/cpu/kernels/gemm.py": ["tests/backends/test_kernels_gemm.py", "tests/backends/test_symbolic_products.py"],
    "backends/tvm/cpu/kernels/blocks.py": ["tests/backends/test_kernels_blocks.py"],
    "backends/tvm/cpu/kernels/linear_blocks.py": ["tests/backends/test_kernels_blocks.py"],
    **{f"frontend/{x}.py": [f"tests/frontend/test_gguf{y}.py" for y in ("", "_hostile", "_llamacpp")]
       for x in ("weights/gguf", "gguf/metadata", "gguf/model", "gguf/tokenizer")},
    "ir/lift.py": ["tests/ir/test_lift.py", "tests/passes/test_rows.py"],
    **{f"ir/{x}.py": ["tests/ir/test_text.py", "tests/ir/test_hostile_text.py"] for x in ("parser", "tokens")},
    **{f"ir/{x}.py": ["tests/ir/test_dims.py"] for x in ("dims", "solve", "checks")},
    "ir/vjp.py": ["tests/ir/test_vjp.py", *(f"tests/passes/test_autodiff.py::test_{x}" for x in (
        "text", "an_operation_without_gradient_is_named_with_its_line", "a_model_of_everything_against_differences",
    ))],
    "ir/ops/quant.py": ["tests/ir/test_registry.py", "tests/ir/test_axes.py", "tests/passes/test_quantize.py"],
    **{f"ir/ops/{x}.py": ["tests/ir/test_registry.py", "tests/ir/test_axes.py", "tests/ir/test_vjp.py"] for x in OPS},
    "runtime/artifact.py": ["tests/runtime/test_artifact_written.py", "tests/runtime/test_artifact.py"],
    "runtime/manifest.py": ["tests/runtime/test_manifest.py", "tests/runtime/test_artifact.py"],
    "runtime/interface.py": ["tests/runtime/test_manifest.py", "tests/runtime/test_artifact.py"],
    "runtime/session.py": ["tests/runtime/test_session.py", "tests/runtime/test_session_rows.py"],
    "runtime/slots.py": ["tests/runtime/test_session_rows.py"],
    "ir/interface.py": ["tests/ir/test_interface.py", "tests/runtime/test_manifest.py"],
    "runtime/generate.py": [
        "tests/runtime/test_generate.py", "tests/runtime/test_text_stream.py", "tests/face/test_along.py",
    ],
    **{f"runtime/media/{x}.py": [f"tests/runtime/test_media{y}.py" for y in ("_kinds", "_damage", "")]
       for x in ("audio", "base", "files", "image", "video")},
    "training/step.py": ["tests/training/test_step.py", "tests/training/test_precision.py"],
    "training/places.py": ["tests/training/test_own_loss.py", "tests/training/test_step.py"],
    "training/divergence.py": ["tests/training/test_diverged.py"],
    "training/flops.py": ["tests/training/test_flops.py"],
    "training/loop.py": ["tests/training/test_loop.py", "tests/training/test_diverged.py"],
}
FLIPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}
SUMS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """The faults of one expression or statement, as what stands in its place."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[i] = FLIPS[type(op)]()
            yield new
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.BinOp) and type(node.op) in SUMS and not isinstance(node.left, ast.JoinedStr):
        yield ast.BinOp(node.left, SUMS[type(node.op)](), node.right)
    elif isinstance(node, ast.Set) and len(node.elts) > 1:
        yield from (ast.Set([x for x in node.elts if x is not left]) for left in node.elts)
    elif isinstance(node, ast.Dict):
        for i, key in enumerate(node.keys):
            if key is not None:
                yield ast.Dict(node.keys[:i] + node.keys[i + 1 :], node.values[:i] + node.values[i + 1 :])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield ast.Call(ast.Name(CALLS[node.func.id]), node.args, node.keywords)
    elif isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise | ast.Return):
        yield ast.Pass()


def _told(x: ast.AST) -> bool:
    """Whether it is an operation's samples, which are tests themselves."""
    return isinstance(x, ast.FunctionDef) and x.name in ("samples", "errors")


def mutants(source: str, at: Collection[int] = ()) -> list[str]:
    """Every mutant of a source text (in the lines ``at``), each a whole text: only the place of the fault differs."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data, made = source.encode(), []
    tree = ast.parse(source)
    inside = {x for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) or _told(f) for x in ast.walk(f)}
    for node in ast.walk(tree):
        if node in inside or (at and getattr(node, "lineno", None) not in at):
            continue
        for new in _changes(node):
            begin = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            text = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(new, ast.expr):
                text = f"({text})"
            elif data[begin:begin + 4] == b"elif":
                continue
            made.append((data[:begin] + text.encode() + data[end:]).decode())
    return made


def covering(file: str) -> list[str]:
    if file in TESTS:
        return TESTS[file] + (VALUES if file.startswith("passes/") else [])
    room, name = file.split("/")[0], Path(file).stem
    own = f"tests/{room}/test_{name}.py"
    return [own if (ROOT / own).exists() else f"tests/{room}"]


def farm(scratch: Path, file: str) -> Path:
    """The packages as links under `scratch`; `file` is a copy that may be changed. Returns the copy."""
    shutil.copytree(ROOT / "wasat", scratch / "wasat", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ROOMS:
        shutil.copytree(ROOT / room, scratch / "wasat" / room, copy_function=os.symlink,
                        ignore=shutil.ignore_patterns("__pycache__"))
    path = scratch / (file if file.startswith("wasat/") else f"wasat/{file}")
    path.unlink()
    shutil.copy(ROOT / file, path)
    return path


def _run(scratch: Path, tests: list[str], limit: float | None, *options: str, **env: str) -> bool:
    env = {**os.environ, "PYTHONPATH": f"{scratch}:{ROOT / 'tests'}", "PYTHONSAFEPATH": "1", **env}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, "-m", "not slow", *tests]
    if limit is not None:  # of the processor: a machine that is busy changes nothing
        command = ["bash", "-c", f'ulimit -t {math.ceil(limit)} && exec "$@"', "bash", *command]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=limit and 30 * limit)
    except subprocess.TimeoutExpired:  # it waits for something
        return False
    return done.returncode == 0


def passes(scratch: Path, tests: list[str], limit: float) -> bool:
    """Whether the tests pass over the packages in `scratch`; too long is a fault noticed."""
    return _run(scratch, tests, limit)


class Tried(NamedTuple):
    """What became of a mutant in a fork: whether a test notices it (None: not tried), and the tests that reach it."""
    killed: bool | None
    tests: list[str]


def tried_in_forks(
    scratch: Path, copied: Path, drawn: list[str], tests: list[str], limit: float, within: float = math.inf
) -> list[Tried]:
    """What `mutants_forked` finds of each mutant, all in one process that collects the tests once."""
    given = scratch / "mutants.json"
    told = {"path": str(copied), "source": copied.read_text(), "mutants": drawn, "limit": limit, "within": within}
    given.write_text(json.dumps(told))
    _run(scratch, tests, None, "-p", "mutants_forked", MUTANTS=str(given))
    made = json.loads(given.read_text())
    if "answers" not in made:
        return [Tried(None, [])] * len(drawn)
    for name in made["failing"]:
        print(f"left out, fails or takes too long without a mutant: {name}", flush=True)
    return [Tried(**x) for x in made["answers"]]


def outside(source: str, mutant: str) -> bool:
    """Whether a mutant changes what runs when the module is imported."""
    def told(text: str) -> str:
        tree = ast.parse(text)
        for x in ast.walk(tree):
            if isinstance(x, ast.FunctionDef):
                x.body = []
        return ast.dump(tree)
    return told(source) != told(mutant)


def sample(
    file: str, seed: int, count: int, limit: float, at: Collection[int] = (), within: float = math.inf
) -> tuple[int, list[str]]:
    """Tries ``count`` mutants of a file, or every one of some lines. Returns how many, and the differences of the survivors."""
    source = (ROOT / file).read_text()
    every = mutants(source, at)
    drawn = random.Random(f"{seed} {file}").sample(every, min(count, len(every))) if not at else every
    survivors, sound = [], False
    with tempfile.TemporaryDirectory() as name:
        copied, tests = farm(Path(name), file), covering(file)
        tried = tried_in_forks(Path(name), copied, drawn, tests, limit, within)
        for i, (mutant, found) in enumerate(zip(drawn, tried)):
            if found.killed:
                continue
            if found.killed is None or outside(source, mutant):  # in a process of its own, by all tests
                if not sound:
                    copied.write_text(source)
                    if not (sound := passes(Path(name), tests, limit)):
                        raise RuntimeError(f"{file}: {' '.join(tests)} fail without a mutant, or take more than {limit:g} s")
                copied.write_text(mutant)
                os.utime(copied, (i, i))  # bytecode is told apart by the second and the size
                if not passes(Path(name), tests, limit):
                    continue
            diff = difflib.unified_diff(source.splitlines(), mutant.splitlines(), file, file, lineterm="", n=0)
            survivors.append("\n".join(list(diff)[2:]))
            print(survivors[-1], flush=True)
    return len(drawn), survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=sorted(TESTS), metavar="FILE[:LINE,..]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--limit", type=float, default=120, help="seconds of the processor for the tests of one mutant")
    parser.add_argument("--within", type=float, default=math.inf,
                        help="seconds of the tests that reach it after which a mutant counts as not noticed")
    args = parser.parse_args()
    for given in args.files:
        file, _, lines = given.partition(":")
        try:
            at = [int(x) for x in lines.split(",") if x]
            drawn, survivors = sample(file, args.seed, args.count, args.limit, at, args.within)
        except RuntimeError as e:
            print(e, flush=True)
            continue
        print(f"{given}: {drawn - len(survivors)} of {drawn} killed", flush=True)


if __name__ == "__main__":
    main()
