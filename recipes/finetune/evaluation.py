"""Evaluation of a model: its loss on a fixed set of validation examples, and generated text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from accelerate import Accelerator
from finetune.data.documents import IGNORED_LABEL

T = TypeVar("T")

TOKENS_AT_ONCE = 4096  # of an evaluation without gradients
TEMPERATURE, TOP_K = 0.7, 40  # of samples


def choose_examples(dataset: Any, at_most: int, seed: int, least: int = 2) -> list[dict[str, Any]]:
    """Choose the examples of every evaluation of a run: always the same ones, and the same number.

    Args:
        dataset: tokenised validation examples.
        at_most: number of examples; all of them where there are fewer.
        seed: public seed of the choice.
        least: tokens of an example; a language model predicts nothing in a single one.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(order[:at_most])
    return [dataset[i] for i in chosen if len(dataset[i]["input_ids"]) >= least]


def batches_of(examples: Sequence[dict[str, Any]], tokens: int = TOKENS_AT_ONCE) -> list[list[dict[str, Any]]]:
    """Cut the examples into batches of at most ``tokens`` tokens, padding included, or of one example.

    Sorted by length, so that little is padded. How training batches are drawn is part of the privacy: dpft sorts those
    after the draw.
    """
    batches: list[list[dict[str, Any]]] = []
    for example in sorted(examples, key=lambda example: len(example["input_ids"])):
        if not batches or (len(batches[-1]) + 1) * len(example["input_ids"]) > tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


@torch.no_grad()
def over_batches(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    accelerator: Accelerator | None,
    act: Callable[[Any, dict[str, torch.Tensor]], Sequence[T]],
) -> list[T]:
    """What ``act`` returns for each batch of the examples, of all ranks, in no particular order.

    Args:
        model: wrapped by dpft or not; in eval mode meanwhile.
        examples: tokenised, with ``input_ids``.
        collate: from a list of examples to a batch.
        accelerator: shares the batches between ranks; every rank runs the same number, as sharded engines need.
        act: from the model and a batch on its device to a list of numbers or tuples of them; as many forwards in each
            call.
    """
    was_training = model.training
    model.eval()
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else next(model.parameters()).device
    found: list[T] = []
    batches = batches_of(examples)
    for start in range(0, len(batches), ranks):
        position = start + rank
        batch = collate(batches[min(position, len(batches) - 1)])
        some = act(model, {name: tensor.to(device) for name, tensor in batch.items()})
        if position < len(batches):  # the last round repeats a batch on ranks that have none left
            found += some
    model.train(was_training)
    return gather_object(found) if accelerator is not None and ranks > 1 else found


def validation_loss(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    accelerator: Accelerator | None = None,
) -> float:
    """Mean loss in nats a token over all tokens of the examples that have a label.

    Computed from the logits, not from the loss that the model returns: a wrapped and a bare model average a batch
    differently, and this number is compared before and after training and with the model reloaded from disk. Of a
    single long text both return the mean over its tokens, and a wrapped model never has all of its logits.

    Args:
        model: a causal language model, wrapped by dpft or not; its training mode is restored.
        examples: tokenised examples.
        collate: from a list of examples to a batch.
        accelerator: see :func:`over_batches`.
    """
    found = over_batches(model, examples, collate, accelerator, lambda network, batch: [_summed_loss(network, batch)])
    return sum(loss for loss, _ in found) / sum(number for _, number in found)


def _summed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The loss summed over the tokens of a batch, and their number."""
    targets = batch["labels"][:, 1:]
    number = int((targets != IGNORED_LABEL).sum())
    if len(targets) == 1 and targets.shape[1] > TOKENS_AT_ONCE:
        return float(model(**batch).loss) * number, number
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return loss.item(), number


@torch.no_grad()
def record_losses(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    accelerator: Accelerator,
) -> list[float]:
    """Loss of each example in nats, summed over its tokens; in the order of ``examples``, the same on every rank.

    Every rank computes all of them, since a forward of a sharded model is a collective.
    """
    was_training = model.training
    model.eval()
    found = []
    size = max(1, TOKENS_AT_ONCE // max(1, *(len(example["input_ids"]) for example in examples), 1))
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size])
        labels = batch.pop("labels")[:, 1:].to(accelerator.device)
        logits = model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()}).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
        )
        found += loss.sum(1).tolist()
    model.train(was_training)
    return found


@torch.no_grad()
def sample_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    seed: int,
    accelerator: Accelerator | None = None,
    special_tokens: bool = True,
) -> str:
    """Let the model continue a prompt, with its own generator, which affects no other random number.

    Does not use ``model.generate``, which bypasses the outermost module, where a sharding engine gathers. There is no
    key-value cache: this is meant for a line or two.

    Args:
        model: a causal language model, or what an engine made of one.
        tokenizer: its tokenizer.
        prompt: public text.
        tokens: number of tokens to write.
        seed: seed of the sampling.
        accelerator: of the run; then all ranks must call this, and use rank 0's tokens. A collective.
        special_tokens: whether the tokenizer adds its own, such as the first; not where the prompt has them.

    Returns:
        The prompt and what follows it.
    """
    was_training = model.training
    model.eval()
    device = accelerator.device if accelerator else next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special_tokens)
    ids = encoded["input_ids"].to(device)
    for _ in range(tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float().cpu()
        likeliest = torch.topk(logits / TEMPERATURE, min(TOP_K, len(logits)))
        drawn = torch.multinomial(likeliest.values.softmax(0), 1, generator=generator)
        chosen = [int(likeliest.indices[drawn])]
        if accelerator is not None:
            broadcast_object_list(chosen)
        if chosen[0] == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, ids.new_tensor([chosen])], dim=1)
    model.train(was_training)
    return tokenizer.decode(ids[0], skip_special_tokens=True)
