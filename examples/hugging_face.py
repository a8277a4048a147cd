"""A Hugging Face folder becomes an artifact, and the artifact writes text.

python examples/hugging_face.py [FOLDER] [OUT]        (default: the small model in examples/pygemma)
"""

import sys
import tempfile
from pathlib import Path

import wasat as ws

with tempfile.TemporaryDirectory() as place:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "pygemma")
    out = Path(sys.argv[2] if len(sys.argv) > 2 else place, f"{folder.name}.wasat")

    program = ws.from_pretrained(folder)  # weights are memory-mapped: nothing is read yet
    print(f"{program.origin.family}, {len(program['forward'])} nodes, context {program.interface.context}")

    # the embedding, which is also the output head, keeps 8 bits
    report = ws.compile(program, out, quantize="int4", overrides={"*embed_tokens*": "int8"})
    for remark in report.remarks("missed"):
        print(remark)
    print(f"{sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB in {out.name}")

    model = ws.load(out)  # needs no compiler
    options = ws.SamplingOptions(temperature=0.7, top_p=0.9, seed=1)
    prompts = ["def read_file(path):\n    ", "class Stack:\n    def push(self"]
    for prompt, result in zip(prompts, model.generate(prompts, max_tokens=40, options=options, stop="\n\n")):
        print(f"--- {result.summary()}\n{prompt}{result.text}")
