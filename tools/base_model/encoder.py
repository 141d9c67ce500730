"""The training of the recipes' small public encoder: a BERT, by masked tokens, on the same text as the Llama."""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, get_scheduler

from tools.base_model.card import encoder_card
from tools.base_model.text import MASK, split_topics, token_stream, train_tokenizer

SHARE_MASKED = 0.15


def masked(ids: Tensor, mask_id: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's task: inputs ``[B, T]`` in which some tokens are hidden, and labels ``[B, T]``, -100 elsewhere.

    Of the 15 % that are to be predicted, 8 in 10 become the mask, 1 in 10 a random token (Devlin et al. 2019).
    """
    draw = torch.rand(ids.shape, generator=generator)
    chosen = draw < SHARE_MASKED
    labels = ids.masked_fill(~chosen, -100)
    inputs = ids.masked_fill(draw < 0.8 * SHARE_MASKED, mask_id)
    other = torch.randint(4, vocabulary, ids.shape, generator=generator)
    return torch.where((draw >= 0.8 * SHARE_MASKED) & (draw < 0.9 * SHARE_MASKED), other, inputs), labels


@torch.no_grad()
def masked_loss(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, stream: Tensor, seq_len: int) -> float:
    """Mean loss in nats a hidden token, over a stream cut into windows; the same tokens are hidden every time."""
    model.eval()
    windows = stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
    inputs, labels = masked(windows, tokenizer.mask_token_id, len(tokenizer), torch.Generator().manual_seed(7))
    total = sum(float(model(input_ids=i, labels=t).loss) * len(i) for i, t in zip(inputs.split(16), labels.split(16)))  # noqa: B905 - of one shape
    model.train()
    return total / len(windows)


def train(args: argparse.Namespace) -> None:
    """Train tokenizer and encoder, and write both with a model card to ``args.output``."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    train_texts, held_out_texts = split_topics()
    tokenizer = train_tokenizer(train_texts, args.vocab_size, MASK)
    stream, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_out_texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=256,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    before = masked_loss(model, tokenizer, held_out, args.seq_len)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(stream) - args.seq_len, (args.batch_size,), generator=generator)
        windows = torch.stack([stream[s : s + args.seq_len] for s in starts])
        inputs, labels = masked(windows, tokenizer.mask_token_id, len(tokenizer), generator)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            held = masked_loss(model, tokenizer, held_out, args.seq_len)
            print(f"step {step}: loss {loss.item():.3f}, held out {held:.3f}, {time.perf_counter() - started:.0f} s")
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training topics": len(train_texts),
        "training tokens": len(stream),
        "tokens seen": args.steps * args.batch_size * args.seq_len,
        "held-out topics": len(held_out_texts),
        "held-out tokens": len(held_out),
        "held-out loss before training, nats a hidden token": round(before, 3),
        "held-out loss after training, nats a hidden token": round(
            masked_loss(model, tokenizer, held_out, args.seq_len), 3
        ),
        "seconds": round(time.perf_counter() - started),
        "threads": args.threads,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "README.md").write_text(encoder_card(args, figures), encoding="utf-8")
    print(json.dumps(figures, indent=1))
