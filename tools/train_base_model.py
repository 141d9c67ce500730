"""Train the small public Llama that the recipes start from: ``recipes/assets/base_model``.

    python tools/train_base_model.py

The text is the documentation of the language that every Python carries, ``pydoc_data.topics``: no network, and public.
The docstrings of the standard library, the data that the recipe then protects, are **not** seen here. One topic,
``debugger``, is left out because it repeats the docstrings of ``pdb``; it is named here, not found by a search through
the docstrings at training time, since a public set chosen by looking at the private one is no longer public.

Bitwise repeatable on one machine with one version of Python and torch; the weights depend on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

ROOT = Path(__file__).resolve().parent.parent
REPEATS_DOCSTRINGS = frozenset({"debugger"})
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def split_topics(held_out_share: float = 0.1) -> tuple[list[str], list[str]]:
    """Split the documentation topics into training and held-out texts.

    Args:
        held_out_share: share of the topics kept for the reported loss, drawn by a hash of the topic's name.

    Returns:
        Training texts and held-out texts, each in the order of the topics' names.
    """
    train: list[str] = []
    held_out: list[str] = []
    for name in sorted(topics):
        if name in REPEATS_DOCSTRINGS:
            continue
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        (held_out if fraction < held_out_share else train).append(topics[name].strip())
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which has a token for every byte and so no unknown text.

    Args:
        texts: public texts.
        vocab_size: number of tokens, the three special ones included.

    Returns:
        A tokenizer that puts ``<bos>`` in front, as Llama's does; whoever needs ``<eos>`` appends it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, padding_side="right", **SPECIAL)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Concatenate the texts to one stream of tokens; packing is harmless here because this text is public.

    Returns an int64 tensor [number of tokens].
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def stream_loss(model: LlamaForCausalLM, stream_N: torch.Tensor, seq_len: int) -> float:
    """Mean loss in nats a token over a stream cut into windows of ``seq_len``."""
    model.eval()
    windows = stream_N[: len(stream_N) // seq_len * seq_len].view(-1, seq_len)
    total = sum(model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16))
    model.train()
    return total / len(windows)


def train(args: argparse.Namespace) -> None:
    """Train tokenizer and model, and write both with a model card to ``args.output``."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    train_texts, held_out_texts = split_topics()
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    stream, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_out_texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=not args.untied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    before = stream_loss(model, held_out, args.seq_len)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(stream) - args.seq_len, (args.batch_size,), generator=generator)
        batch = torch.stack([stream[s : s + args.seq_len] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            held = stream_loss(model, held_out, args.seq_len)
            print(f"step {step}: loss {loss.item():.3f}, held out {held:.3f}, {time.perf_counter() - started:.0f} s")
    seconds = time.perf_counter() - started
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training topics": len(train_texts),
        "training tokens": len(stream),
        "tokens seen": args.steps * args.batch_size * args.seq_len,
        "held-out topics": len(held_out_texts),
        "held-out tokens": len(held_out),
        "held-out loss before training, nats a token": round(before, 3),
        "held-out loss after training, nats a token": round(stream_loss(model, held_out, args.seq_len), 3),
        "training loss after training, nats a token": round(stream_loss(model, stream, args.seq_len), 3),
        "seconds": round(seconds),
        "threads": args.threads,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "README.md").write_text(model_card(args, figures), encoding="utf-8")
    print(json.dumps(figures, indent=1))


def model_card(args: argparse.Namespace, figures: dict[str, float]) -> str:
    """The card that is kept beside the weights: how they were made, and what was measured while making them."""
    command = "python tools/train_base_model.py" + "".join(f" {word}" for word in args.command_line)
    rows = "\n".join(f"| {name} | {value:,} |" for name, value in figures.items())
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny, public-pretraining]
---
# A small Llama, trained on public text

The starting point of dpft's recipes: a Llama with {args.layers} layers, width {args.hidden}, {args.heads} heads over \
{args.heads // 2} key-value heads, {"tied" if not args.untied else "untied"} embeddings, a byte-level BPE of \
{args.vocab_size} tokens, float32. It is made to be fine-tuned in
minutes on a laptop, and for nothing else: what it writes looks like Python's manual and means little.

**Text.** `pydoc_data.topics`, the language documentation that ships with Python (PSF licence), less the topic \
`debugger`, which repeats the docstrings of `pdb`.
The docstrings of the standard library, on which the recipe fine-tunes privately, were not used. This training is not
private, and need not be: its text is public.

**Made by** `{command}`, seed {args.seed}, AdamW, cosine schedule from {args.learning_rate:g}, {args.steps} steps of \
{args.batch_size} windows of {args.seq_len} tokens. The held-out topics are drawn by a hash of their names.

| measured | |
|---|---|
{rows}

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.
"""


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "recipes" / "assets" / "base_model", help="folder to write"
    )
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the BPE (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=96, help="width (default %(default)s)")
    parser.add_argument("--intermediate", type=int, default=256, help="width inside the MLP (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers (default %(default)s)")
    parser.add_argument(
        "--heads", type=int, default=4, help="heads; half as many key-value heads (default %(default)s)"
    )
    parser.add_argument("--untied", action="store_true", help="give the output head weights of its own")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a training window (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="windows in a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; they change the rounding (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and windows (default %(default)s)")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command_line = [w for w in words if "output" not in w] if "--output" not in words else []
    train(args)


if __name__ == "__main__":
    main()
