"""`strategy="auto"` refuses nothing that it can do: where a rule is missing, one example at a time, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import dpft
from accelerate import Accelerator
from tests import oracle, zoo
from tests.clipping.against_oracle import case_of, check, set_checkpointing


class Distances(nn.Module):
    """As many trained points as features, and a function that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class Selecting(nn.Module):
    """A layer that sees a selection of tokens in an order of its own, as experts do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        return x.index_put((chosen,), self.experts[0](x[chosen]))


class Raw(nn.Linear):
    """A parameter that goes into a kernel of its own."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Kernel.apply(x, self.weight)
        return found + self.bias


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, 1).T @ x.flatten(0, 1)


def with_layer(make: Any) -> Any:
    """A Llama whose first MLP is that module."""

    def build(attention: str) -> nn.Module:
        model = zoo.llama(attention)
        model.model.layers[0].mlp = make()
        return model

    return zoo.seeded(build)


LACKING = {
    "function": lambda: Distances(zoo.WIDTH),
    "selection": lambda: Selecting(nn.Linear(zoo.WIDTH, zoo.WIDTH)),
    "kernel": lambda: Raw(zoo.WIDTH, zoo.WIDTH),
}


def entry_of(kind: str) -> zoo.Entry:
    return zoo.Entry(kind, with_layer(LACKING[kind]), zoo.token_batch)


ENTRIES = {kind: entry_of(kind) for kind in LACKING}


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", LACKING)
def test_exact(kind: str, checkpointing: str) -> None:
    if kind != "selection" and checkpointing == "reentrant":
        pytest.skip("a reentrant checkpoint hides its forward: the backward refuses it, which the next test sees")
    check(case_of(ENTRIES[kind]), checkpointing, strategy="auto")


@pytest.mark.parametrize("kind", ["function", "kernel"])
def test_hidden_by_a_reentrant_checkpoint(kind: str) -> None:
    model = ENTRIES[kind].build()
    set_checkpointing(model, "reentrant")
    with pytest.raises(dpft.DPFTError, match="per_example"):
        dpft.wrap(model)(**zoo.token_batch()).loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", LACKING)
def test_it_says_so(kind: str) -> None:
    model = dpft.wrap(ENTRIES[kind].build())
    model(**zoo.token_batch()).loss.backward()
    assert dpft.stats(model).strategy == "per_example"
    text = dpft.explain(model, 4, 9)
    assert "per_example" in text and "one example at a time" in text and "model.layers.0.mlp" in text
    assert "rule" in text or "Not together, since" in text


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("kind", LACKING)
def test_a_strategy_that_is_named_is_not_replaced(kind: str, strategy: Any) -> None:
    with pytest.raises(dpft.DPFTError, match=r"model\.layers\.0\.mlp.*"):
        dpft.wrap(ENTRIES[kind].build(), strategy=strategy)(**zoo.token_batch()).loss.backward()


def test_prepare_takes_physical_batches_of_one(tmp_path: Any) -> None:
    """Known when it wraps: the graph of one example at a time, as in plain training with a batch of one."""
    model: Any = ENTRIES["selection"].build()
    rows = [{name: value[i] for name, value in zoo.token_batch(8).items()} for i in range(8)]
    privacy = dpft.PrivacyConfig(
        noise_multiplier=0.0, target_delta=1e-3, expected_batch_size=4, num_steps=2, max_grad_norm=1.0
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"one example at a time.*mlp\.experts\.0\.bias"):
        model, optimizer, loader = dpft.prepare(
            Accelerator(cpu=True), model, optimizer, rows, privacy, max_physical_batch_size=4, test_seed=1,
            ledger_path=tmp_path / "ledger",
        )  # fmt: skip
    for batch in loader:
        assert len(batch["input_ids"]) == 1
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loader.privacy.steps == 2


def test_losses_of_the_callers_own_are_refused_with_the_way_out() -> None:
    """dpft does not know how to make them of one example."""
    model = dpft.wrap(ENTRIES["function"].build())
    batch = zoo.token_batch()
    batch.pop("labels")
    with pytest.raises(dpft.UnsupportedModuleError, match=r"mlp\.points .*cdist.*per_example"):
        model(**batch)


def test_a_loss_over_the_batch_stays_refused() -> None:
    """What one example alone gives instead is another loss: here always 0."""

    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return F.cross_entropy(y @ y.T, torch.arange(len(x))), y

    model = dpft.wrap(Contrastive())
    with pytest.raises(dpft.ClippingError, match="per example"):
        model(x=torch.randn(3, 4), labels=torch.zeros(3))


@pytest.mark.parametrize("by", ["config", "call"])
def test_the_loss_that_balances_experts(by: str) -> None:
    """One over all tokens of the batch: refused by name, and of each example alone under auto."""

    def build(attention: str = "eager") -> Any:
        sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
        config = hf.Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=2, router_aux_loss_coef=1.0)
        config._experts_implementation, config.output_router_logits = "eager", by == "config"
        return zoo.from_config(hf.Qwen3MoeForCausalLM, config, attention)

    asked = {} if by == "config" else {"output_router_logits": True}
    batch = zoo.token_batch(padding="none")
    with pytest.raises(dpft.ClippingError, match="output_router_logits"):
        model = zoo.seeded(build)()
        for name, p in model.named_parameters():
            p.requires_grad_("experts" not in name)
        dpft.wrap(model, strategy="one_pass")(**batch, **asked)
    exact = oracle.oracle(zoo.seeded(build)(), batch, lambda m, rows: m(**rows, output_router_logits=True).loss[None])
    model = dpft.wrap(zoo.seeded(build)(), max_grad_norm=float(exact.norms.median()))
    model(**batch, **asked).loss.backward()
    assert dpft.stats(model).strategy == "per_example"
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)
