"""The training of the recipes' base model."""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from tools.base_model.card import model_card
from tools.base_model.text import split_topics, token_stream, train_tokenizer


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
