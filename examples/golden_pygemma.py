"""Golden values of the pygemma checkpoint from transformers: float32, eager attention, on the CPU.

    pip install torch==2.13.0 transformers==5.23.0
    python golden_pygemma.py FOLDER     ->  FOLDER/golden.npz

``ids`` i64[200] (longer than the window of 64), ``logits`` f32[200, 2048], ``nll`` in nats per token, and ``greedy_0`` to
``greedy_2``: the ids of a prompt followed by 100 greedy tokens. The text is that of this Python's ``json.decoder``.
"""

import inspect
import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, Gemma3ForCausalLM

BOS, PAD = 2, 0
PROMPTS = ("def read_file(path):\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def encode(text: str) -> list[int]:
        return [BOS, *tokenizer(text, add_special_tokens=False).input_ids]

    ids = torch.tensor([encode(inspect.getsource(json.decoder))[:200]])
    greedy = {}
    with torch.no_grad():
        logits = model(ids).logits[0]
        for i, prompt in enumerate(PROMPTS):
            out = model.generate(
                torch.tensor([encode(prompt)]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=PAD
            )
            greedy[f"greedy_{i}"] = out[0].numpy()
    np.savez_compressed(
        f"{folder}/golden.npz", ids=ids[0].numpy(), logits=logits.numpy(),
        nll=float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])),
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}", **greedy,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
