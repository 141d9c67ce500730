"""What is benchmarked: models of a fixed seed, and for every library one step that ends with the clipped sum.

A step is forward and backward. Noise and the optimiser cost every private library the same and are left out, unless
``Shape.update`` asks for a whole step with AdamW, for ours with noise. Weights are not tied, which Opacus' ghost
clipping and fastDP cannot do, except where a shape says so.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dpft

# Far below the norm of any gradient here, so that every example is clipped and a wrong norm shows in the sum.
MAX_GRAD_NORM = 1e-3
LABELS = 2
STRATEGIES = ("one_pass", "two_pass", "per_example")
Step = Callable[[Tensor], dict[str, Tensor]]
"""input_ids [B, T] -> the gradient of each trainable parameter by name; the model keeps none."""


@dataclass(frozen=True)
class Shape:
    """A model and a batch. ``heads``, ``kv_heads`` and ``intermediate`` come from the width where they are 0.

    ``architecture`` is ``llama``, ``gpt2``, or ``bert``, an encoder with a classification head. ``lora`` is the rank
    of the adapters that are trained instead of the weights; 0 trains the weights.
    """

    architecture: str = "llama"
    width: int = 512
    layers: int = 4
    vocab: int = 4000
    tokens: int = 2048
    rows: int = 1
    dtype: str = "float32"
    checkpointing: bool = False
    update: bool = False
    heads: int = 0
    kv_heads: int = 0
    intermediate: int = 0
    tied: bool = False
    lora: int = 0

    def __str__(self) -> str:
        extras = (
            [f", LoRA r={self.lora}"] * (self.lora > 0)
            + [", checkpointed"] * self.checkpointing
            + [", with the optimiser"] * self.update
        )
        return (
            f"{self.architecture} {self.width} x {self.layers}, V={self.vocab}, T={self.tokens}, B={self.rows}, "
            f"{self.dtype}{''.join(extras)}"
        )


@dataclass(frozen=True)
class Method:
    """One way to the clipped sum.

    Attributes:
        make: ``(model, shape) -> Step``; it may change the model.
        note: what a reader must know of its figures.
        reentrant: it needs the reentrant kind of checkpointing.
        noise: it brings an optimiser that adds noise, for ``Shape.update``.
        frozen_norms: it has no rule for RMSNorm, whose weights are frozen for it, and in what it is compared with.
    """

    make: Callable[[Any, Shape], Step]
    note: str = ""
    reentrant: bool = False
    frozen_norms: bool = False
    noise: bool = False

    def freezes(self, shape: Shape) -> bool:
        """Whether weights of normalisations are frozen in a model of that shape."""
        return self.frozen_norms and shape.architecture == "llama"

    def remark(self, shape: Shape) -> str:
        """The notes that hold for a shape."""
        parts = [self.note] if self.note else []
        if shape.checkpointing and self.reentrant:
            parts.append("reentrant checkpointing: it refuses the other kind")
        if self.freezes(shape):
            parts.append("RMSNorm weights frozen: it has no rule for them")
        return "; ".join(parts)


def build_model(shape: Shape, device: str, method: Method | None = None) -> Any:
    """The model of a shape in training mode, from a fixed seed, the same for every method on one kind of device."""
    torch.manual_seed(0)
    width = shape.width
    heads = shape.heads or max(1, width // 64)
    common: dict[str, Any] = {"vocab_size": shape.vocab, "use_cache": False, "tie_word_embeddings": shape.tied}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            if shape.architecture == "gpt2":
                gpt2 = GPT2Config(
                    n_embd=width,
                    n_layer=shape.layers,
                    n_head=heads,
                    n_positions=shape.tokens,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **common,
                )
                model: Any = GPT2LMHeadModel(gpt2)
            elif shape.architecture == "bert":
                bert = BertConfig(
                    vocab_size=shape.vocab,
                    hidden_size=width,
                    intermediate_size=shape.intermediate or 4 * width,
                    num_hidden_layers=shape.layers,
                    num_attention_heads=max(1, width // 32),
                    max_position_embeddings=shape.tokens,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    num_labels=LABELS,
                )
                model = BertForSequenceClassification(bert)
            else:
                llama = LlamaConfig(
                    hidden_size=width,
                    intermediate_size=shape.intermediate or width * 11 // 4,
                    num_hidden_layers=shape.layers,
                    num_attention_heads=heads,
                    num_key_value_heads=shape.kv_heads or heads,
                    max_position_embeddings=shape.tokens,
                    **common,
                )
                model = LlamaForCausalLM(llama)
    finally:
        torch.set_default_dtype(before)
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=shape.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    if shape.checkpointing:
        reentrant = method is not None and method.reentrant
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if method is not None and method.freezes(shape):
        for name, p in model.named_parameters():
            p.requires_grad_(not is_norm(name))
    return model


def is_norm(parameter: str) -> bool:
    """Whether a parameter of Llama, by its name, is the weight of a normalisation."""
    return "norm" in parameter


def input_ids(shape: Shape, device: str, tokens: int | None = None) -> Tensor:
    """``[B, T]`` int64 tokens from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape.vocab, (shape.rows, tokens or shape.tokens), generator=generator).to(device)


def _positions(shape: Shape, ids: Tensor) -> dict[str, Tensor]:
    """GPT-2's position ids, one row an example: what Opacus and fastDP make of a row for all is wrong or an error."""
    if shape.architecture != "gpt2":
        return {}
    # Not a view: Opacus' ghost clipping flattens them.
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)}


def classes_of(ids: Tensor) -> Tensor:
    """``[B]`` labels of an encoder's texts."""
    return ids[:, 0] % LABELS


def losses_of(module: Any, shape: Shape, ids: Tensor) -> Tensor:
    """``[B]`` each example's mean loss, from the logits: the loss of libraries that bring none."""
    if shape.architecture == "bert":
        return F.cross_entropy(module(input_ids=ids).logits.float(), classes_of(ids), reduction="none")
    logits = module(input_ids=ids, **_positions(shape, ids)).logits[:, :-1]
    flat = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1).mean(1)


def take(model: nn.Module, attribute: str = "grad") -> dict[str, Tensor]:
    """The gradients by name, taken out of the model, wherever a library left them."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name.removeprefix("_module.")] = getattr(p, attribute)
            if attribute != "grad":
                delattr(p, attribute)
        p.grad = None
    return found


def _train(model: Any, shape: Shape, private: bool) -> Step:
    """What a user of Hugging Face writes."""

    def step(ids: Tensor) -> dict[str, Tensor]:
        if shape.architecture == "bert" and private:
            dpft.clipped_loss(model, losses_of(model, shape, ids)).backward()
        else:
            labels = classes_of(ids) if shape.architecture == "bert" else ids
            model(input_ids=ids, labels=labels).loss.backward()
        return take(model)

    return step


def plain(model: Any, shape: Shape) -> Step:
    """Plain Hugging Face training: its own loss."""
    return _train(model, shape, private=False)


def ours(**options: Any) -> Callable[[Any, Shape], Step]:
    """dpft, by ``dpft.wrap`` with these options."""

    def make(model: Any, shape: Shape) -> Step:
        dpft.wrap(model, max_grad_norm=MAX_GRAD_NORM, **options)
        return _train(model, shape, private=True)

    return make


def make_optimizer(method: Method, model: Any, shape: Shape) -> torch.optim.Optimizer:
    """AdamW, for ours inside dpft's optimiser with a noise multiplier of 1."""
    inner = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    return dpft.DPOptimizer(inner, 1.0, MAX_GRAD_NORM, shape.rows) if method.noise else inner


def opacus_hooks(model: Any, shape: Shape) -> Step:
    """Opacus' per-sample gradients, clipped and summed by its own optimiser."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=MAX_GRAD_NORM, expected_batch_size=shape.rows)

    def step(ids: Tensor) -> dict[str, Tensor]:
        losses_of(module, shape, ids).mean().backward()
        optimizer.clip_and_accumulate()
        found = {n.removeprefix("_module."): p.summed_grad for n, p in module.named_parameters() if p.requires_grad}
        optimizer.zero_grad()
        return found

    return step


def opacus_two_pass(ghost: bool) -> Callable[[Any, Shape], Step]:
    """Opacus' ghost clipping, or its fast gradient clipping, as its own loss tensor runs them."""

    def make(model: Any, shape: Shape) -> Step:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        module = GradSampleModuleFastGradientClipping(
            model,
            batch_first=True,
            loss_reduction="mean",
            max_grad_norm=MAX_GRAD_NORM,
            use_ghost_clipping=ghost,
        )
        inner = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer = DPOptimizerFastGradientClipping(
            inner, noise_multiplier=0.0, max_grad_norm=MAX_GRAD_NORM, expected_batch_size=shape.rows
        )

        def step(ids: Tensor) -> dict[str, Tensor]:
            DPTensorFastGradientClipping(module, optimizer, losses_of(module, shape, ids), "mean").backward()
            found = take(module)
            optimizer.zero_grad()
            return found

        return step

    return make


def fastdp(model: Any, shape: Shape) -> Step:
    """fastDP's book-keeping, mode "MixOpt" (github.com/awslabs/fast-differential-privacy; in no package index)."""
    engine = importlib.import_module("fastDP")
    # What it puts in the place of GPT-2's forward calls functions that transformers 5 has not; it is there to give
    # every example its own positions, which losses_of does here.
    engine.transformers_support.forward_swapper = lambda module: None
    engine.PrivacyEngine(
        model,
        batch_size=shape.rows,
        sample_size=1000 * shape.rows,
        epochs=1,
        noise_multiplier=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        clipping_fn="Abadi",
        clipping_mode="MixOpt",
        numerical_stability_constant=0.0,
        loss_reduction="mean",
    )

    def step(ids: Tensor) -> dict[str, Tensor]:
        losses_of(model, shape, ids).mean().backward()
        return take(model, "private_grad")

    return step


METHODS: dict[str, Method] = {
    "plain": Method(plain),
    **{strategy: Method(ours(strategy=strategy), noise=True) for strategy in STRATEGIES},
    **{
        f"{strategy}_triton": Method(ours(strategy=strategy, impl="triton"), noise=True) for strategy in STRATEGIES[:2]
    },
    "auto": Method(ours(strategy="auto"), noise=True),
    "ghost": Method(ours(clipping="ghost"), "the published baseline, by dpft", noise=True),
    "fast": Method(ours(clipping="fast"), "one layer's gradients at a time, by dpft", noise=True),
    "opacus_hooks": Method(opacus_hooks, reentrant=True),
    "opacus_ghost": Method(opacus_two_pass(True), reentrant=True),
    "opacus_fast": Method(opacus_two_pass(False), reentrant=True),
    "fastdp": Method(fastdp, "it draws noise, of scale 0, in its backward", frozen_norms=True),
}


def find_method(name: str) -> Method:
    """One of :data:`METHODS`, or ``module:function``, a function ``(model, shape) -> Step`` of one's own.

    Raises:
        ValueError: an unknown name.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"method is {name!r}; expected one of {', '.join(METHODS)}, or module:function of your own")
    return Method(getattr(importlib.import_module(module), function))
