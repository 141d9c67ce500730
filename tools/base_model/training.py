"""The training of the recipes' small public models: of the Llama, and what the encoder's shares with it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from tools.base_model.card import model_card
from tools.base_model.text import split_topics, token_stream, train_tokenizer


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Attributes:
        special: tokens of its tokenizer besides the usual ones.
        build: arguments, tokenizer -> the untrained model.
        batch: windows ``[B, T]``, tokenizer, generator -> the model's inputs and labels.
        loss: model, tokenizer, stream, tokens of a window -> mean loss in nats.
        of: what the loss is a mean over.
        second_beta: of AdamW.
        card: arguments, figures -> the model card.
    """

    special: Mapping[str, str]
    build: Callable[[argparse.Namespace, PreTrainedTokenizerFast], Any]
    batch: Callable[[Tensor, PreTrainedTokenizerFast, torch.Generator], dict[str, Tensor]]
    loss: Callable[[Any, PreTrainedTokenizerFast, Tensor, int], float]
    of: str
    second_beta: float
    card: Callable[[argparse.Namespace, dict[str, float]], str]


def windows_of(stream_N: Tensor, seq_len: int) -> Tensor:
    """``[number, seq_len]``: a stream cut into windows; what is left at its end is dropped."""
    return stream_N[: len(stream_N) // seq_len * seq_len].view(-1, seq_len)


@torch.no_grad()
def _stream_loss(model: Any, tokenizer: PreTrainedTokenizerFast, stream_N: Tensor, seq_len: int) -> float:
    """Mean loss in nats a token over a stream cut into windows of ``seq_len``."""
    model.eval()
    windows = windows_of(stream_N, seq_len)
    total = sum(model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16))
    model.train()
    return total / len(windows)


def _llama(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
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
    )


LLAMA = Task(
    special={},
    build=_llama,
    batch=lambda windows, tokenizer, generator: {"input_ids": windows, "labels": windows},
    loss=_stream_loss,
    of="token",
    second_beta=0.95,
    card=model_card,
)


def train(args: argparse.Namespace, task: Task) -> None:
    """Train tokenizer and model, and write both with a model card to ``args.output``."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    train_texts, held_out_texts = split_topics()
    tokenizer = train_tokenizer(train_texts, args.vocab_size, task.special)
    stream, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_out_texts)
    model = task.build(args, tokenizer).train()
    betas = (0.9, task.second_beta)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, betas=betas)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    before = task.loss(model, tokenizer, held_out, args.seq_len)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(stream) - args.seq_len, (args.batch_size,), generator=generator)
        windows = torch.stack([stream[s : s + args.seq_len] for s in starts])
        loss = model(**task.batch(windows, tokenizer, generator)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            held = task.loss(model, tokenizer, held_out, args.seq_len)
            print(f"step {step}: loss {loss.item():.3f}, held out {held:.3f}, {time.perf_counter() - started:.0f} s")
    seconds = time.perf_counter() - started
    held, seen = (task.loss(model, tokenizer, text, args.seq_len) for text in (held_out, stream))
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training topics": len(train_texts),
        "training tokens": len(stream),
        "tokens seen": args.steps * args.batch_size * args.seq_len,
        "held-out topics": len(held_out_texts),
        "held-out tokens": len(held_out),
        f"held-out loss before training, nats a {task.of}": round(before, 3),
        f"held-out loss after training, nats a {task.of}": round(held, 3),
        f"training loss after training, nats a {task.of}": round(seen, 3),
        "seconds": round(seconds),
        "threads": args.threads,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "README.md").write_text(task.card(args, figures), encoding="utf-8")
    print(json.dumps(figures, indent=1))
