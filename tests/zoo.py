"""Tiny models of every family that dpft promises, made from a config, seeded, with nothing downloaded.

One-dimensional parameters are moved off their initial ones and zeros, and weights are larger than Hugging Face starts
them, so that attention is not uniform and no gradient vanishes by symmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from tests.oracle import Batch, LossesOf, causal_lm_losses

VOCAB = 61
WIDTH = 32


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: its name in test ids.
        build: makes the same float32 model every time; takes the attention implementation.
        batch: (examples, tokens, seed) -> a batch with `labels`.
        losses: per-example losses [B] of a plain or wrapped model.
        causal: whether `out.loss` is the way in; otherwise `dpft.clipped_loss` is.
        checkpointing: whether Hugging Face can checkpoint it.
    """

    name: str
    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    losses: LossesOf = causal_lm_losses
    causal: bool = True
    checkpointing: bool = True

    def __str__(self) -> str:
        return self.name


def seeded(build: Callable[..., nn.Module], seed: int = 0) -> Callable[..., nn.Module]:
    """Always the same weights, generic ones, in training mode; the global generator is left as it was."""

    def built(attention: str = "sdpa") -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build(attention)
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 1:
                        p.add_(0.2 * torch.randn_like(p))
        return model.train()

    return built


def from_config(cls: Any, config: Any, attention: str) -> nn.Module:
    """An HF model of `config`, with that attention implementation."""
    config._attn_implementation = attention
    return cls(config)


def token_batch(
    examples: int = 4, tokens: int = 9, seed: int = 0, padding: str = "right", vocab: int = VOCAB
) -> dict[str, Tensor]:
    """Random tokens of random lengths: input_ids, attention_mask, labels, each [B, T].

    The first example is full; labels are -100 on padding and, for the examples that have room, on a prompt.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (examples, tokens), generator=g)
    if tokens > 2:
        ids[0, 1] = ids[0, 0]  # equal tokens within one example
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for i in range(1, examples):
        length = int(torch.randint(min(3, tokens), tokens + 1, (1,), generator=g))
        pad = slice(length, tokens) if padding == "right" else slice(0, tokens - length)
        mask[i, pad], labels[i, pad], ids[i, pad] = 0, -100, 1
        if i % 2 and length > 4:
            start = 0 if padding == "right" else tokens - length
            labels[i, start : start + 2] = -100
        if padding == "left" and length < tokens:
            labels[i, tokens - length] = -100  # what is predicted from padding depends on the longest row
    if padding == "none":
        mask = torch.ones_like(ids)
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.12,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def llama(attention: str, **more: Any) -> nn.Module:
    return from_config(hf.LlamaForCausalLM, hf.LlamaConfig(**_sizes(**more)), attention)


def qwen3(attention: str) -> nn.Module:
    config = hf.Qwen3Config(**_sizes(num_key_value_heads=2, head_dim=8, attention_bias=True))
    return from_config(hf.Qwen3ForCausalLM, config, attention)


def gemma(attention: str) -> nn.Module:
    config = hf.GemmaConfig(**_sizes(num_key_value_heads=1, head_dim=8, pad_token_id=0, tie_word_embeddings=True))
    return from_config(hf.GemmaForCausalLM, config, attention)


def gemma3(attention: str) -> nn.Module:
    config = hf.Gemma3TextConfig(
        **_sizes(
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=0,
            tie_word_embeddings=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    return from_config(hf.Gemma3ForCausalLM, config, attention)


def generic_experts(model: nn.Module) -> nn.Module:
    """Experts with generic weights and biases, which loop over experts."""
    for name, module in model.named_modules():
        if name.endswith("experts"):
            for p in module.parameters():
                nn.init.normal_(p, std=0.12)
    model.set_experts_implementation("eager")  # type: ignore[operator]  # of transformers; the others refuse float64
    return model


def qwen3_moe(attention: str) -> nn.Module:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = hf.Qwen3MoeConfig(**_sizes(head_dim=8, **experts))
    return generic_experts(from_config(hf.Qwen3MoeForCausalLM, config, attention))


def hybrid(attention: str) -> nn.Module:
    """Qwen3.5: a gated delta net, whose mixer reads its convolution's filters, and a layer of attention."""
    linear = {f"linear_{name}_head_dim": 8 for name in ("key", "value")} | {"linear_num_key_heads": 2}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
    config = hf.Qwen3_5TextConfig(**_sizes(head_dim=8, **linear, **kinds))
    return from_config(hf.Qwen3_5ForCausalLM, config, attention)


def gpt2(attention: str) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.12,
        bos_token_id=1,
        eos_token_id=2,
    )
    return from_config(hf.GPT2LMHeadModel, config, attention)


def opt(attention: str) -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=0.12,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return from_config(hf.OPTForCausalLM, config, attention)


def bert(attention: str) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.12,
        num_labels=3,
    )
    return from_config(hf.BertForSequenceClassification, config, attention)


def classification_batch(examples: int = 4, tokens: int = 9, seed: int = 0, **_: Any) -> dict[str, Tensor]:
    """Tokens and one class per example: `labels` is [B]."""
    batch = token_batch(examples, tokens, seed)
    batch["labels"] = torch.arange(examples) % 3
    return batch


def classification_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B] cross-entropy of the logits [B, classes]."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return F.cross_entropy(logits.float(), batch["labels"], reduction="none")


def lora(attention: str) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llama(attention), config)


def frozen_embedding(attention: str) -> nn.Module:
    model = llama(attention)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


class MLP(nn.Module):
    """Plain torch modules: Linear with and without bias, LayerNorm, RMSNorm; on [B, p] or [B, T, p]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 24),
            nn.LayerNorm(24),
            nn.GELU(),
            nn.Linear(24, 20, bias=False),
            nn.RMSNorm(20, eps=1e-6),
            nn.Tanh(),
            nn.Linear(20, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def vector_batch(examples: int = 4, tokens: int = 0, seed: int = 0, **_: Any) -> dict[str, Tensor]:
    """x [B, 12], or [B, T, 12] with `tokens`, and labels [B] or [B, T]."""
    g = torch.Generator().manual_seed(seed)
    shape = (examples, tokens) if tokens else (examples,)
    return {"x": torch.randn(*shape, 12, generator=g), "labels": torch.randint(0, 5, shape, generator=g)}


def vector_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B] cross-entropy, the mean over the tokens where there are any."""
    logits = model(batch["x"]).float()
    flat = F.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), reduction="none")
    return flat.view(len(logits), -1).mean(1)


LLAMA = Entry("llama", seeded(llama), token_batch)
LLAMA_TIED = Entry("llama-tied", seeded(lambda a: llama(a, tie_word_embeddings=True)), token_batch)
LLAMA_GQA = Entry("llama-gqa", seeded(lambda a: llama(a, num_key_value_heads=2, pad_token_id=1)), token_batch)
LLAMA_BIAS = Entry("llama-bias", seeded(lambda a: llama(a, attention_bias=True, mlp_bias=True)), token_batch)
QWEN3 = Entry("qwen3", seeded(qwen3), token_batch)
GEMMA = Entry("gemma", seeded(gemma), token_batch)
GEMMA3 = Entry("gemma3", seeded(gemma3), token_batch)
GPT2 = Entry("gpt2", seeded(gpt2), token_batch)
OPT = Entry("opt", seeded(opt), token_batch)
BERT = Entry("bert", seeded(bert), classification_batch, classification_losses, causal=False)
LORA = Entry("lora", seeded(lora), token_batch)
FROZEN = Entry("frozen-embedding", seeded(frozen_embedding), token_batch)
MLP_ENTRY = Entry("mlp", seeded(lambda a: MLP()), vector_batch, vector_losses, causal=False, checkpointing=False)
MLP_TOKENS = replace(
    MLP_ENTRY,
    name="mlp-tokens",
    batch=lambda examples=4, tokens=7, seed=0, **_: vector_batch(examples, tokens, seed),
)

ZOO = (
    LLAMA, LLAMA_TIED, LLAMA_GQA, LLAMA_BIAS, QWEN3, GEMMA, GEMMA3, GPT2, OPT, BERT, LORA, FROZEN,
    MLP_ENTRY, MLP_TOKENS,
)  # fmt: skip
