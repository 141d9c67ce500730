"""Blocks in tiles: loss and gradients of the untiled model; private ones of one example at a time."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpft
from dpft.errors import ClippingError, UnsupportedModuleError
from dpft.long_context import tiles
from dpft.rules.tiles import TilePass
from tests import oracle, zoo
from tests.clipping.against_oracle import case_of, check_grads, check_stats, private_loss
from tests.long_context.setups import MODELS, TILE, blocks_of, gradients, long, tokens

models = pytest.mark.parametrize("entry", MODELS, ids=str)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tiles of each backward of a tiled block."""
    made: list[int] = []
    plain = tiles._Call.backward

    def counted(self: Any, *args: Any) -> Any:
        made.append(len(self.spans))
        return plain(self, *args)

    monkeypatch.setattr(tiles._Call, "backward", counted)
    return made


@models
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_plain_training_is_the_same(entry: zoo.Entry, dtype: torch.dtype, backwards: list[int]) -> None:
    batch = entry.batch(examples=2)
    plain, tiled = entry.build().to(dtype), long(entry.build().to(dtype))
    expected, found = entry.losses(plain, batch), entry.losses(tiled, batch)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0)
    error = oracle.relative_error(gradients(tiled, found), gradients(plain, expected))
    # An attention that has no mask adds up in another order; softmax and norms are float32 in any case.
    assert error <= (tolerance if dtype == torch.float32 else 1e-6 if entry is zoo.GEMMA3 else 1e-12), error
    assert len(backwards) == len(blocks_of(tiled)) >= 4
    assert set(backwards) == {3}


@models
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", pytest.param("per_example", marks=pytest.mark.slow)])
def test_private_gradients_are_those_of_the_oracle(entry: zoo.Entry, strategy: str, backwards: list[int]) -> None:
    case = case_of(entry, examples=3)
    model = dpft.wrap(long(case.build()), max_grad_norm=case.max_grad_norm, strategy=strategy)
    private_loss(entry, model, case.batch, strategy).backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))
    check_stats(case, model)
    assert len(backwards) >= len(blocks_of(model)), "the tiles did not run"


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_other_batches(examples: int, strategy: str) -> None:
    case = case_of(zoo.LLAMA_TIED, examples=examples)
    model = dpft.wrap(long(case.build()), max_grad_norm=case.max_grad_norm, strategy=strategy)
    for _ in range(2):
        model.zero_grad()
        model(**case.batch).loss.backward()
        check_grads(case, model, case.exact.factors(case.max_grad_norm))
        check_stats(case, model)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_after_wrapping_it_is_the_same(strategy: str) -> None:
    found = []
    for before in (True, False):
        model = zoo.LLAMA.build()
        model = long(model) if before else model
        dpft.wrap(model, max_grad_norm=0.5, strategy=strategy)
        model = model if before else long(model)
        model(**zoo.LLAMA.batch()).loss.backward()
        found.append(oracle.grads_of(copy.deepcopy(model)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_off_restores_everything() -> None:
    def attributes(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
        hidden = {"_parameters", "_modules", "_buffers"}
        return [(n, {k: v for k, v in m.__dict__.items() if k not in hidden}) for n, m in model.named_modules()]

    model, state = zoo.LLAMA.build(), torch.get_rng_state()
    before, attention = attributes(model), model.config._attn_implementation
    batch = zoo.LLAMA.batch()
    expected = gradients(model, zoo.LLAMA.losses(model, batch))
    assert dpft.long_context(model, tile_mlp=TILE) is model
    assert torch.equal(torch.get_rng_state(), state), "long_context drew from the generator"
    assert model.is_gradient_checkpointing and model.config._attn_implementation != attention
    with pytest.raises(dpft.WrapError, match="on already"):
        dpft.long_context(model)
    assert dpft.long_context(model, off=True) is model
    assert attributes(model) == before and model.config._attn_implementation == attention
    found = gradients(model, zoo.LLAMA.losses(model, batch))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(dpft.WrapError, match="not on"):
        dpft.long_context(model, off=True)


def test_off_and_unwrap_in_any_order() -> None:
    batch = zoo.LLAMA.batch()
    model = zoo.LLAMA.build()
    expected = gradients(model, zoo.LLAMA.losses(model, batch))
    for first, second in ((dpft.unwrap, "off"), ("off", dpft.unwrap)):
        model = dpft.wrap(long(zoo.LLAMA.build()))
        for step in (first, second):
            dpft.long_context(model, off=True) if step == "off" else step(model)
        assert not any("forward" in m.__dict__ for m in model.modules())
        found = gradients(model, zoo.LLAMA.losses(model, batch))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_deep_copy_is_independent() -> None:
    model = dpft.wrap(long(zoo.LLAMA.build()), max_grad_norm=0.5)
    copied = copy.deepcopy(model)
    batch = zoo.LLAMA.batch()
    copied(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    model(**batch).loss.backward()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_norm_is_that_of_the_sum_over_tiles() -> None:
    """Tiles whose gradients cancel: squared per tile they would have a norm, and their sum has none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.up(x)) * 0 + self.up(x)

    net, x = Net(), torch.randn(2, 2 * TILE, 3, generator=torch.Generator().manual_seed(0))
    x[:, TILE:] = x[:, :TILE]
    sign = torch.ones(2 * TILE).index_fill_(0, torch.arange(TILE, 2 * TILE), -1.0)
    for strategy in ("one_pass", "two_pass"):
        model = dpft.wrap(copy.deepcopy(net), max_grad_norm=1.0, strategy=strategy, isolation="off")
        run = functools.partial(tiles.run_in_tiles, tiles.Tiles(TILE, 1.0, [model.up]), model.up)
        state = model.__dict__["_dpft_state"]
        state.begin(x.shape, 2 * TILE)
        losses = (run(x) * sign.view(1, -1, 1)).sum((1, 2))
        state.end()
        dpft.clipped_loss(model, losses).backward()
        assert dpft.stats(model).norms.max() < 1e-5
        # and without cancellation it has one
        state.begin(x.shape, 2 * TILE)
        losses = run(x).sum((1, 2))
        state.end()
        dpft.clipped_loss(model, losses).backward()
        expected = 3**0.5 * x.sum(1).norm(dim=1)
        torch.testing.assert_close(dpft.stats(model).norms, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_a_missing_tile_is_an_error(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dpft.wrap(long(zoo.LLAMA.build()), strategy=strategy)
    loss = model(**zoo.LLAMA.batch(examples=1)).loss
    plain = tiles._Call.backward

    def dropped(self: Any, *args: Any) -> Any:
        self.spans = self.spans[:-1]
        return plain(self, *args)

    monkeypatch.setattr(tiles._Call, "backward", dropped)
    with pytest.raises(ClippingError, match="8 of 9 tokens"):
        loss.backward()


def with_shared_mlp(attention: str = "sdpa") -> nn.Module:
    """The second layer runs the first one's MLP."""
    model = zoo.LLAMA.build(attention)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def with_inner_checkpoint(attention: str = "sdpa") -> nn.Module:
    """An MLP that is checkpointed inside of its layer's checkpoint."""

    class Inside(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = zoo.LLAMA.build(attention)
    for layer in model.model.layers:
        layer.mlp = Inside(layer.mlp)
    return model


def with_frozen_weights(attention: str = "sdpa") -> nn.Module:
    model = zoo.LLAMA.build(attention)
    for name, p in model.named_parameters():
        p.requires_grad_("up_proj" in name or "layers.1.input_layernorm" in name)
    return model


@pytest.mark.parametrize("build", [with_shared_mlp, with_inner_checkpoint, with_frozen_weights])
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_unusual_models(build: Any, strategy: str) -> None:
    case = case_of(ENTRIES[build.__name__], examples=3)
    model = dpft.wrap(long(case.build()), max_grad_norm=case.max_grad_norm, strategy=strategy)
    model(**case.batch).loss.backward()
    check_grads(case, model, case.exact.factors(case.max_grad_norm))
    check_stats(case, model)


ENTRIES = {
    build.__name__: zoo.Entry(build.__name__, build, zoo.token_batch)
    for build in (with_shared_mlp, with_inner_checkpoint, with_frozen_weights)
}


def test_dropout_in_tiles_is_that_of_the_forward() -> None:
    """One traversal, two, and plain training draw the same masks: their norms and sums agree."""
    batch, found = zoo.GPT2.batch(examples=1), []
    for strategy in ("one_pass", "two_pass", None):
        model = zoo.GPT2.build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        long(model)
        assert any(block.method == "forward" and "MLP" in type(block.owner).__name__ for block in blocks_of(model))
        torch.manual_seed(5)
        if strategy is None:
            zoo.GPT2.losses(model, batch).sum().backward()
        else:
            dpft.wrap(model, max_grad_norm=1e9, strategy=strategy)
            model(**batch).loss.backward()
        found.append(oracle.grads_of(model))
    assert oracle.relative_error(found[0], found[1]) < 1e-6
    assert oracle.relative_error(found[0], found[2]) < 1e-5


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_mixing_inside_of_a_tile_is_found(strategy: str) -> None:
    """A block that treats tokens apart and examples not: the isolation check by gradients looks inside of tiles."""

    class Mixing(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y + 0.5 * y.roll(1, 0)

    model = zoo.LLAMA.build()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    long(model)
    assert any(isinstance(block.owner, Mixing) for block in blocks_of(model))
    dpft.wrap(model, strategy=strategy, isolation="off")
    with pytest.raises(ClippingError, match="gradient in other examples' rows"):
        model(**zoo.LLAMA.batch()).loss.backward()


class Hidden(torch.autograd.Function):
    """A product whose weight no torch function sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, 1).sum(0)


@pytest.mark.parametrize("way", ["no torch function", "no attribute"])
def test_a_hidden_use_inside_of_a_tile_is_refused(way: str) -> None:
    class Scaled(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = mlp, nn.Parameter(torch.ones(zoo.WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if way == "no attribute":  # in whose place a rule would put what it sees
                return self.inner(x) * self._parameters["scale"]
            return Hidden.apply(self.inner(x), self.scale)

    model = zoo.LLAMA.build()
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp)
    dpft.wrap(long(model), strategy="one_pass")
    with pytest.raises(UnsupportedModuleError, match=r"mlp\.scale"):
        model(**zoo.LLAMA.batch(examples=1)).loss.backward()


def test_only_what_treats_tokens_apart_is_tiled() -> None:
    class Running(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).cumsum(1)

    class Capacity(nn.Module):
        """Drops what is over a capacity: tokens apart, until there are many."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.arange(x.shape[1]) < 30
            return self.inner(x) * kept.view(1, -1, 1)

    model = zoo.LLAMA.build()
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = Running(layers[0].mlp), Capacity(layers[1].mlp)
    owners = [block.owner for block in blocks_of(long(model))]
    assert layers[0].mlp not in owners and layers[1].mlp not in owners
    assert layers[0].mlp.inner in owners and layers[1].mlp.inner in owners
    assert model.model.norm in owners and model.lm_head not in owners
    assert not any(type(owner) is nn.Linear for owner in owners)


def test_tokens_of_a_tile() -> None:
    assert tiles.Tiles(7, 5.0, []).tokens(100) == 7
    auto = tiles.Tiles("auto", 5.0, [])
    assert auto.tokens(100) == tiles.LEAST_TOKENS
    assert auto.tokens(12000) == 1000  # 12 tiles: twice what is saved, and two more
    with pytest.raises(ValueError, match="tile_mlp"):
        dpft.long_context(zoo.LLAMA.build(), tile_mlp=0)
    with pytest.raises(ValueError, match="GradientCheckpointingLayer"):
        dpft.long_context(zoo.MLP_ENTRY.build())
    assert not blocks_of(long(zoo.LLAMA.build(), None))


def test_bf16_sums_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed over tiles, and its norm, are float32: the reported norm is that of the released gradient."""
    model = dpft.wrap(long(zoo.LLAMA.build().to(torch.bfloat16)), max_grad_norm=1e9, strategy="one_pass")
    for p in model.parameters():
        p.grad_dtype = torch.float32
    seen: list[torch.dtype] = []
    plain = TilePass.finish

    def watched(self: TilePass, length: int) -> dict[str, Tensor]:
        seen.extend(found.grad.dtype for found in self._sums.values())
        return plain(self, length)

    monkeypatch.setattr(TilePass, "finish", watched)
    model(**zoo.LLAMA.batch(examples=1)).loss.backward()
    assert seen and set(seen) == {torch.float32}
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    torch.testing.assert_close(dpft.stats(model).norms[0].double(), norm, rtol=5e-3, atol=0.0)
    assert dpft.stats(model).norms[0] >= norm * (1 - 1e-6)


def test_evaluation_runs_in_tiles_too() -> None:
    plain, model = zoo.LLAMA.build(), long(zoo.LLAMA.build())
    ids = tokens(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert F.mse_loss(model(input_ids=ids).logits, plain(input_ids=ids).logits) < 1e-10


def test_tiles_are_one_use_of_a_weight() -> None:
    """As which it is sent to other ranks when its gradient is complete, and not kept for further uses."""
    model = dpft.wrap(long(zoo.LLAMA_TIED.build()))
    model(input_ids=zoo.token_batch(1, 9)["input_ids"])
    uses = model.__dict__["_dpft_state"].trace.uses
    assert uses.pop("model.embed_tokens.weight") == 2 and set(uses.values()) == {1}
    assert "model.layers.0.mlp.up_proj.weight" in uses
