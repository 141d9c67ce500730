"""Where two gradients are one tensor, are used once more than was noted, or cancel: no contribution exceeds C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm

import dpft
from dpft.clipping.factors import ClipRule
from dpft.clipping.passes import KeepPass, NormPass, Trace, WeightedPass
from dpft.kernels.linear import linear_sq_norm
from dpft.kernels.weighted import RowWeights
from dpft.rules.base import EmbeddingUse, LinearUse


class OneGradientForTwo(nn.Module):
    """Autograd hands both parameters one and the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.a + self.b)).sum((1, 2))


class OneMemoryForTwo(nn.Module):
    """Autograd hands them two tensors of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.a + self.b.view(2))).sum((1, 2))


class ConstantGradient(torch.autograd.Function):
    """Gives out a tensor that it keeps."""

    kept = torch.ones(4)

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sum()[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ConstantGradient.kept


class KeepsItsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return ConstantGradient.apply(self.w)  # type: ignore[no-any-return]  # torch does not type apply


@pytest.mark.parametrize("function", ["abadi", "automatic"])
@pytest.mark.parametrize(
    "build",
    [OneGradientForTwo, OneMemoryForTwo, KeepsItsGradient],
    ids=["one tensor", "one memory", "a constant"],
)
def test_parameters_that_share_a_gradient(build: Any, function: Any) -> None:
    """Each further example adds its own contribution and nothing else."""

    def clipped(count: int) -> Tensor:
        model = dpft.wrap(build(), strategy="per_example", clip_function=function)
        dpft.clipped_loss(model, [model(torch.full((1, 1, 2), 3.5e-3)).squeeze() for _ in range(count)]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one = clipped(1)
    assert float(one.norm()) <= 1.0
    for count in (2, 3):
        torch.testing.assert_close(clipped(count), count * one)
    assert bool((ConstantGradient.kept == 1).all()), "a tensor of the model's was written to"


class OverItsOutputGradient(torch.autograd.Function):
    """Multiplies, and in the backward writes over the output gradient, as nothing may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x * by

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].mul_(ctx.by), None


class BesideALayer(nn.Module):
    """A layer whose output gradient is that of its neighbour, which writes over it once the layer has used it."""

    def __init__(self, layer: nn.Module, width: int, by: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.layer, self.by = nn.Linear(width, width), layer, by
        self.low.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        return (OverItsOutputGradient.apply(h, self.by) + self.layer(20 * h)).square().sum((1, 2))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("what", ["pair", "vector"])
def test_a_gradient_that_is_written_over_after_its_norm_was_taken(what: str, strategy: str) -> None:
    """What is kept from a layer's backward to the release: never another one than that of the norm."""
    pair = what == "pair"
    width, tokens = (32, 3) if pair else (8, 1)
    model = dpft.wrap(
        BesideALayer(nn.Linear(32, 32) if pair else DebertaLayerNorm(8, 1e-5), width, 30.0), strategy=strategy
    )
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1))
    losses: Any = model(x) if strategy != "per_example" else [model(x[i : i + 1])[0] for i in range(2)]
    loss = dpft.clipped_loss(model, losses, torch.tensor([1.0, 0.0]))
    if pair and strategy == "one_pass":
        with pytest.raises(dpft.ClippingError, match=r"'layer\.weight' was changed in place.*strategy='two_pass'"):
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
        return
    loss.backward()
    contribution = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert 0.99 < float(contribution.norm()) <= 1.0 * (1 + 1e-6)


class NormsOfOneToken(nn.Module):
    """At T = 1 the gradient of a bias is autograd's own, which the embedding and the other bias receive, too."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.scale = nn.Embedding(50, 8), scale
        self.first, self.second = DebertaLayerNorm(8, 1e-5), DebertaLayerNorm(8, 1e-5)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1)).expand(len(ids), 1, 8)
        total = self.embedding(ids) + self.first(h) + self.second(2 * h)
        return total.square().sum((1, 2)) * self.scale


@pytest.mark.parametrize(("function", "scale"), [("abadi", 10.0), ("abadi", 0.029), ("automatic", 1e-4)])
def test_norms_of_one_token(function: Any, scale: float) -> None:
    sums: dict[str, Tensor] = {}
    for strategy in ("one_pass", "two_pass", "per_example"):
        model: Any = dpft.wrap(NormsOfOneToken(scale), strategy=strategy, clip_function=function)
        for _ in range(2):  # onto the gradient of a physical batch before
            losses = model(torch.tensor([[3]]))
            dpft.clipped_loss(model, losses if strategy != "per_example" else [losses[0]]).backward()
        sums[strategy] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert float(sums[strategy].norm()) <= 2.0 * (1 + 1e-6)
    torch.testing.assert_close(sums["one_pass"], sums["two_pass"])
    torch.testing.assert_close(sums["one_pass"], sums["per_example"])


class ZLossForCausalLM(LlamaForCausalLM):
    """Adds a loss of the logits after ``loss_function``, as Bamba does: the tied weight's third use."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            loss = loss + logits.logsumexp(-1).pow(2).mean(1)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_a_loss_of_the_logits_after_the_loss(strategy: str) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model = ZLossForCausalLM(config).double()
        model.model.embed_tokens.weight.data.mul_(20)
        return model

    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in ("auto", None):
        model = dpft.wrap(build(), max_grad_norm=0.1, strategy=strategy, loss_chunk=chunk)
        for row in (ids[:1], ids[1:]):
            model.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            contribution = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert float(contribution.norm()) <= 0.1 * (1 + 1e-9)
        found.append(contribution)
    torch.testing.assert_close(*found)


def cancelling() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, h, the logits' gradient and the embedding's in bf16: of a tied weight whose two gradients nearly cancel."""
    m1, m2 = 1 + 78 / 128, 1 + 12 / 128
    product = m1 * 64 * m2
    best = (0.0, 0.0)
    for q in range(40):
        other = float(torch.tensor(product * (1 - q / 256)).bfloat16())
        rounded = product**2 + other**2 - 2 * float(torch.tensor(product).bfloat16()) * other
        if rounded > 0:
            best = max(best, (abs(product - other) / max(1.0, rounded**0.5), other))
    h, g_head, g_embedding = (torch.zeros(2, 8, n, dtype=torch.bfloat16) for n in (32, 64, 32))
    h[:, 0, 0], g_head[:, 0, 0], g_embedding[:, 0, 0] = m1 * 64, m2, -best[1]
    return torch.arange(8).repeat(2, 1), h, g_head, g_embedding


def test_a_tied_weight_whose_gradients_cancel_in_bf16() -> None:
    """Rounding the parts of a small sum to bf16 would leave it without a bound."""
    ids, h, g_head, g_embedding = cancelling()
    head, embedding, weight = LinearUse("w", 64, 32), EmbeddingUse("w", 64, 32), torch.zeros(64, 32)
    first = torch.tensor([1.0, 0.0])

    keep = KeepPass(2, torch.device("cpu"), "smaller")
    keep.matrix(head, h, g_head, weight)
    keep.matrix(embedding, ids, g_embedding, weight)
    keep.finish()
    keep.scale(ClipRule(1.0).factors(keep.sq) * first)
    released = keep.release("w", weight, torch.float32)
    assert released is not None and float(released.norm()) <= 1.0

    trace = Trace()
    trace.uses["w"], trace.ids["w"] = 2, ids
    for shared in (set(), {"w"}):
        norms = NormPass(2, torch.device("cpu"), None, trace, shared)
        norms.matrix(head, h, g_head, weight)
        norms.matrix(embedding, ids, g_embedding, weight)
        assert not norms.finish()
        weighted = WeightedPass(RowWeights(ClipRule(1.0).factors(norms.sq) * first))
        parts = (weighted.matrix(head, h, g_head, weight), weighted.matrix(embedding, ids, g_embedding, weight))
        assert parts[0] is not None and parts[1] is not None
        assert float((parts[0] + parts[1]).norm()) <= 1.0


def test_a_third_use_is_noticed_whatever_was_noted() -> None:
    """What a forward noted of its uses is a hint: a head used twice and its embedding leave no cross term out."""
    ids, h, g_head, g_embedding = (t if t.dtype == torch.int64 else t.float() for t in cancelling())
    head, embedding, weight = LinearUse("w", 64, 32), EmbeddingUse("w", 64, 32), torch.zeros(64, 32)
    trace = Trace()
    trace.uses["w"], trace.ids["w"] = 2, ids
    shared: set[str] = set()
    for repetition in range(2):
        norms = NormPass(2, torch.device("cpu"), None, trace, shared)
        norms.matrix(head, h, g_head, weight)
        norms.matrix(head, h, g_head, weight)
        norms.matrix(embedding, ids, g_embedding, weight)
        unresolved = norms.finish()
        assert unresolved == ({"w"} if repetition == 0 else set())
        shared = shared | unresolved
    exact = 2 * h.mT.double() @ g_head.double()
    exact[:, 0, 0] += g_embedding[:, 0, 0].double()  # token 0's row
    torch.testing.assert_close(norms.sq, exact.square().sum((1, 2)))


def test_a_norm_of_rounded_tiles_is_not_understated() -> None:
    """The two bf16 numbers whose product bf16 rounds down the most."""
    numbers = 1 + torch.arange(128, dtype=torch.float64) / 128
    products = numbers[:, None] * numbers
    lost = 1 - products.to(torch.bfloat16).double() / products
    i, j = divmod(int(lost.argmax()), 128)
    x, g = (torch.full((1, 1, 1), float(numbers[k]), dtype=torch.bfloat16) for k in (i, j))
    exact = float(products[i, j])
    assert float(linear_sq_norm(x, g, "feature").sqrt()) < exact * (1 - 3e-3), "nothing was lost: the test is void"
    norms = NormPass(1, torch.device("cpu"), "feature", Trace(), set())
    norms.matrix(LinearUse("w", 1, 1), x, g, torch.zeros(1, 1))
    norms.finish()
    weighted = WeightedPass(RowWeights(ClipRule(1.0).factors(norms.sq)))
    released = weighted.matrix(LinearUse("w", 1, 1), x, g, torch.zeros(1, 1))
    assert released is not None and float(released.norm()) <= 1.0
