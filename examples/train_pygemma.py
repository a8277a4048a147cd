"""Trains a small language model of the Gemma 3 architecture on Python's standard library and saves it as a Hugging Face folder.

    pip install torch==2.13.0 transformers==5.23.0
    python train_pygemma.py FOLDER [--minutes 15]

The corpus is every .py file of this Python's standard library outside tests; each twentieth file is held out. How many steps
fit into the minutes depends on the machine.
"""

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

PAD, EOS, BOS = 0, 1, 2
VOCAB, LENGTH, BATCH, RATE = 2048, 256, 12, 3e-3
SKIPPED = {
    "test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "ensurepip",
}  # fmt: skip


def corpus() -> tuple[list[str], list[str]]:
    """The texts to train on and those held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if not SKIPPED & set(p.relative_to(library).parts))
    texts = [p.read_text(errors="ignore") for p in files]
    return [t for i, t in enumerate(texts) if i % 20 != 7], [t for i, t in enumerate(texts) if i % 20 == 7]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<bos>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.concatenate([np.array([BOS, *e.ids, EOS], np.int64) for e in tokenizer.encode_batch(texts)])


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    texts, held = corpus()
    tokenizer = train_tokenizer(texts)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(options.folder)
    train_ids, held_ids = encode(tokenizer, texts), encode(tokenizer, held)

    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64, max_position_embeddings=2048, sliding_window=64,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, tie_word_embeddings=True,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def batch(ids: np.ndarray) -> torch.Tensor:
        starts = rng.integers(0, len(ids) - LENGTH - 1, BATCH)
        return torch.from_numpy(np.stack([ids[i : i + LENGTH + 1] for i in starts]))

    start, step, smooth = time.time(), 0, math.nan
    while (done := (time.time() - start) / 60 / options.minutes) < 1:
        rate = RATE * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch(train_ids))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}: loss {smooth:.3f} after {time.time() - start:.0f} s", flush=True)

    model.eval()
    with torch.no_grad():
        held_out = float(np.mean([loss_of(model, batch(held_ids)).item() for _ in range(20)]))
    model.to(torch.bfloat16).save_pretrained(options.folder)
    record = {
        "steps": step, "train_loss": smooth, "held_out_loss_nats_per_token": held_out,
        "train_tokens_seen": step * BATCH * LENGTH, "corpus_tokens": len(train_ids),
    }  # fmt: skip
    (options.folder / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out loss {held_out:.3f} nats per token")


if __name__ == "__main__":
    main()
