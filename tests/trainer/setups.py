"""What the tests of the Trainers share: a tokenizer, tiny models, records, and the clipped sum of a step."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import dpft
from tests import zoo

WORDS = [f"w{i}" for i in range(zoo.VOCAB - 3)]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
RATE, CLIP = 100.0, 0.002  # of a norm that even a preference has, and updates that float32 weights show


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Of whole words, with a chat template."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
    fast.chat_template = TEMPLATE
    return fast


def text(shuffled: random.Random, least: int = 3, most: int = 9) -> str:
    """Some words."""
    return " ".join(shuffled.choice(WORDS) for _ in range(shuffled.randint(least, most)))


def pairs(count: int = 6) -> Dataset:
    """Prompts with a chosen and a rejected answer, of unequal lengths."""
    r = random.Random(1)
    return Dataset.from_list(
        [{"prompt": text(r), "chosen": " " + text(r), "rejected": " " + text(r)} for _ in range(count)]
    )


def completions(count: int = 6) -> Dataset:
    """Prompts with an answer."""
    r = random.Random(2)
    return Dataset.from_list([{"prompt": text(r), "completion": " " + text(r)} for _ in range(count)])


def saved_llama(folder: Path, cls: type = hf.LlamaForCausalLM) -> Path:
    """A tiny Llama in a folder, as TRL loads its reference model from there."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=zoo.WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        num_labels=1,
    )
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # so that gradients are not small
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def whole_data(count: int, **changes: Any) -> dpft.PrivacyConfig:
    """One step of all ``count`` examples, without noise."""
    values: dict[str, Any] = {
        "target_delta": 1e-3,
        "expected_batch_size": count,
        "noise_multiplier": 0.0,
        "num_steps": 1,
        "max_grad_norm": CLIP,
        **changes,
    }
    return dpft.PrivacyConfig(**values)


def arguments(cls: type, folder: Path, **changes: Any) -> Any:
    """One step of SGD at a high learning rate, in physical batches of two and four."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        **changes,
    }
    return cls(str(folder), **values)


def moved(model: nn.Module, train: Callable[[], Any]) -> list[Tensor]:
    """The gradient by which ``train`` moves the trainable parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    train()
    return [(b - p.detach()) / RATE for b, p in zip(before, trained, strict=True)]


def clipped_mean(model: nn.Module, losses: list[Callable[[], Tensor]], clip: float = CLIP) -> list[Tensor]:
    """The mean of clipped gradients: each loss alone, of a plain model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in trained]
    for loss in losses:
        grads = torch.autograd.grad(loss(), trained, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
        assert norm > clip, "the example would not be clipped, and its scale not be tested"
        for t, g in zip(total, grads, strict=True):
            if g is not None:
                t += g * (clip / norm) / len(losses)
    return total


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """In float32, by the size of all of them together: an update is read from weights, which are rounded."""
    size = max(float(t.abs().max()) for t in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=3e-4 * size)
