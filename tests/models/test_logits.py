"""Models that do something to their logits or labels before the loss: never a loss of other logits in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import dpft

IDS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


class Base(LlamaForCausalLM):
    """Stops between its head and its loss."""

    def change(self, logits: Tensor, labels: Any) -> Tensor:
        return logits

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.change(self.lm_head(self.model(input_ids=input_ids).last_hidden_state), labels)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class SetItemForCausalLM(Base):
    def change(self, logits: Tensor, labels: Any) -> Tensor:
        logits[..., 3:9] = -1e4
        return logits


class InPlaceForCausalLM(Base):
    def change(self, logits: Tensor, labels: Any) -> Tensor:
        logits.mul_(3.0)
        return logits


class LabelsForCausalLM(Base):
    def change(self, logits: Tensor, labels: Any) -> Tensor:
        if labels is not None:
            labels[labels < 10] = -100
        return logits


class LayerForCausalLM(Base):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Linear(config.vocab_size, config.vocab_size)

    def change(self, logits: Tensor, labels: Any) -> Tensor:
        return self.extra(logits)


class HookForCausalLM(Base):
    def change(self, logits: Tensor, labels: Any) -> Tensor:
        if logits.requires_grad:
            mask = torch.ones(logits.shape[:2])
            mask[:, 0] = 0
            logits.register_hook(lambda g: g * mask.unsqueeze(-1).to(g))
        return logits


class Square(torch.autograd.Function):
    """Takes its input without any torch function."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (a,) = ctx.saved_tensors
        return 2 * a * g


class FunctionForCausalLM(Base):
    def change(self, logits: Tensor, labels: Any) -> Tensor:
        return Square.apply(logits)


class PlainForCausalLM(Base):
    pass


def build(cls: type[Base], chunk: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return dpft.wrap(cls(config).double(), max_grad_norm=1e9, strategy="one_pass", loss_chunk=chunk)


def steps(cls: type[Base], chunk: Any) -> list[Tensor]:
    """Losses and gradients of two steps, and the loss of an evaluation that comes first."""
    model = build(cls, chunk)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS.clone()).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    with torch.no_grad():
        found.append(build(cls, chunk)(input_ids=IDS, labels=IDS.clone()).loss)
    return found


@pytest.mark.parametrize("cls", [SetItemForCausalLM, InPlaceForCausalLM, LabelsForCausalLM])
def test_what_a_model_changes_is_in_its_loss(cls: type[Base]) -> None:
    for ours, theirs in zip(steps(cls, "auto"), steps(cls, None), strict=True):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [LayerForCausalLM, HookForCausalLM, FunctionForCausalLM])
def test_what_would_be_lost_is_refused(cls: type[Base]) -> None:
    model = build(cls, "auto")
    with pytest.raises(dpft.ClippingError, match="loss_chunk=None"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    steps(cls, None)  # which works


def test_logits_of_weights_that_are_gone_are_refused() -> None:
    model = build(PlainForCausalLM, "auto")
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    with pytest.raises(dpft.ClippingError, match="changed"):
        out.logits.argmax(-1)


def test_what_is_written_into_read_logits_stays() -> None:
    out = build(PlainForCausalLM, "auto")(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        out.logits[:, 0] = 7.0
        assert bool((out.logits[:, 0] == 7.0).all())
