"""The card that is kept beside the base model's weights."""

from __future__ import annotations

import argparse
import platform

import tokenizers
import torch
import transformers


def model_card(args: argparse.Namespace, figures: dict[str, float]) -> str:
    """The card that is kept beside the weights: how they were made, and what was measured while making them."""
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

{_making(args, figures)}"""


def encoder_card(args: argparse.Namespace, figures: dict[str, float]) -> str:
    """The card beside the encoder's weights."""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [bert, tiny, public-pretraining]
---
# A small BERT, trained on public text

The starting point of dpft's recipe for classification: a BERT with {args.layers} layers, width {args.hidden}, \
{args.heads} heads, a byte-level BPE of {args.vocab_size} tokens, float32, trained to predict hidden tokens. It is made
to be fine-tuned in minutes on a laptop, and for nothing else.

{_making(args, figures)}"""


def _making(args: argparse.Namespace, figures: dict[str, float]) -> str:
    """The text, the command, the figures and the versions."""
    command = "python tools/train_base_model.py" + "".join(f" {word}" for word in args.command_line)
    rows = "\n".join(f"| {name} | {value:,} |" for name, value in figures.items())
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    return f"""**Text.** `pydoc_data.topics`, the language documentation that ships with Python (PSF licence), less the
topic `debugger`, which repeats the docstrings of `pdb`. The docstrings of the standard library, on which the recipes
fine-tune privately, were not used. This training is not private, and need not be: its text is public.

**Made by** `{command}`, seed {args.seed}, AdamW, cosine schedule from {args.learning_rate:g}, {args.steps} steps of \
{args.batch_size} windows of {args.seq_len} tokens. The held-out topics are drawn by a hash of their names.

| measured | |
|---|---|
{rows}

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.
"""
