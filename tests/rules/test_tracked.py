"""Parameters that are used as plain tensors: exact in one and two passes whatever is done with them, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpft
from dpft.errors import DPFTError
from tests.clipping.nets import Net, exact_or_refused, losses_of, seeded, step, x_batch

norm_strategies = pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
D, B, T = 6, 3, 5


class Uses(nn.Module):
    """Parameters of these shapes, and what the forward does with them and x [B, T, 6]."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.way = way
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def heads(x: Tensor) -> Tensor:
    """[B, T, 6] -> [B, 2, T, 3]."""
    return x.view(*x.shape[:2], 2, 3).transpose(1, 2)


def with_sinks(m: Any, x: Tensor) -> Tensor:
    """gpt-oss: one more logit for each head."""
    q = heads(x)
    logits = q @ q.mT
    sinks = m.sinks.reshape(1, -1, 1, 1).expand(len(x), -1, x.shape[1], -1)
    p = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return (p @ q).transpose(1, 2).reshape(x.shape)


def with_token(m: Any, x: Tensor) -> Tensor:
    """ViT: a class token in front, and positions."""
    h = torch.cat([m.token.expand(len(x), -1, -1), x], dim=1) + m.positions
    return h[:, 1:] * h[:, :1]


def scan(m: Any, x: Tensor) -> Tensor:
    """Mamba: a decay of parameters alone, a step of both."""
    dt = F.softplus(x + m.dt_bias)
    decay = torch.exp(-m.A_log.to(x.dtype).exp()[None, None] * dt.unsqueeze(-1))
    state, out = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + x[:, t].unsqueeze(-1)
        out.append(state.sum(-1))
    return torch.stack(out, 1) + x * m.D[None, None, :]


def differential(m: Any, x: Tensor) -> Tensor:
    """DiffLlama: a scalar of four vectors."""
    scale = torch.exp((m.q1 * m.k1).sum()) - torch.exp((m.q2 * m.k2).sum(dtype=x.dtype)) + 0.8
    return x - scale * x.roll(1, -1)


def looked_up(m: Any, x: Tensor) -> Tensor:
    """A table by ids of each row, and one by distances, which are the same for all."""
    ids = (x[..., 0] > 0).long()
    distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]).clamp(-2, 2) + 2
    return (m.bias[distance].squeeze(-1) @ x) + m.table[ids] + F.embedding(ids, m.other * 2)


def of_both_sides(m: Any, x: Tensor) -> Tensor:
    mixed = m.tokens @ x
    return (
        torch.tanh(mixed @ m.right)
        + x @ m.left.T
        + torch.einsum("btd,de->bte", x, m.square)
        + (x @ m.vector)[..., None]
    )


def blocks(m: Any, x: Tensor) -> Tensor:
    """Griffin: a matrix for each head, the tokens of the batch in the second dimension."""
    flat = x.reshape(-1, 2, 3).permute(1, 0, 2)
    y = torch.baddbmm(m.bias[:, None, :], flat, m.weight) + torch.bmm(flat, m.weight * 2)
    return y.transpose(0, 1).reshape(x.shape)


def routed(m: Any, x: Tensor) -> Tensor:
    """A router: flattened tokens, and a matrix that is cast."""
    flat = x.reshape(-1, D)
    scores = F.linear(flat, m.weight.to(x.dtype), m.bias).softmax(-1) * m.scale
    return (flat * scores[:, :1] + m.shift * scores[:, 1:2]).view(x.shape)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(D))})

    def forward(self, x: Tensor) -> Tensor:
        for gain in self.gains:
            x = x * gain
        return x + self.named["shift"]


class Reads(nn.Module):
    """Mamba's mixer: the parameters of modules inside, read and not called; one of them is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, groups=D, padding=2)
        self.proj = nn.Linear(D, D)
        self.inner = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.squeeze(1)
        h = F.conv1d(x.mT, weight.unsqueeze(1), self.conv.bias, padding=2, groups=D)[..., : x.shape[1]].mT
        h = (self.proj.weight @ h.mT).mT + self.proj.bias
        return self.proj(h) + self.inner(x)


class Shared(nn.Module):
    """A trained layer applied to a parameter, and to a constant: the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.proj = nn.Parameter(torch.randn(4, D)), nn.Linear(D, D)
        self.register_buffer("eye", torch.eye(D))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.proj(self.latents)
        weight = self.proj(self.eye)
        return (x @ keys.T).softmax(-1) @ keys + x @ weight


class Table(nn.Module):
    """Positions [T] of all rows, and buckets [T, T] of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.buckets = nn.Embedding(16, D), nn.Embedding(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = self.buckets((at[:, None] - at[None]).clamp(-2, 2) + 2).permute(2, 0, 1).unsqueeze(0)
        q = heads(x + self.positions(at))
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).reshape(x.shape)


class OnePlus(nn.LayerNorm):
    """Nemotron's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def conv2d() -> nn.Module:
    """Patches of an image [B, 1, T - 1, 6], and filters that overlap."""
    inside = nn.Sequential(nn.Conv2d(1, 3, 2, stride=2), nn.Conv2d(3, 6, 2, padding=1, bias=False))

    def way(m: Any, x: Tensor) -> Tensor:
        y = m.inside(x[:, None, :4])
        return x * y.mean((2, 3))[:, None, :]

    model = Uses(way)
    model.inside = inside
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "sinks": lambda: Uses(with_sinks, sinks=(2,)),
    "class token": lambda: Uses(with_token, token=(1, 1, D), positions=(1, T + 1, D)),
    "scan": lambda: Uses(scan, A_log=(D, 4), dt_bias=(D,), D=(D,)),
    "lambdas": lambda: Uses(differential, q1=(4,), k1=(4,), q2=(4,), k2=(4,)),
    "tables": lambda: Uses(looked_up, bias=(5, 1), table=(2, D), other=(2, D)),
    "matrices": lambda: Uses(of_both_sides, tokens=(T, T), right=(D, D), left=(D, D), square=(D, D), vector=(D,)),
    "heads": lambda: Uses(blocks, weight=(2, 3, 3), bias=(2, 3)),
    "router": lambda: Uses(routed, weight=(4, D), bias=(4,), scale=(4,), shift=(D,)),
    "lists": Listed,
    "read by the module around": Reads,
    "layers of a parameter": Shared,
    "shared ids": Table,
    "LayerNorm1p": lambda: OnePlus(D),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
    "convolution": lambda: Uses(lambda m, x: m.conv(x.mT).mT),
    "images": conv2d,
    "group norm": lambda: nn.GroupNorm(1, T),
    "PReLU": lambda: nn.PReLU(T),
    "recurrent": lambda: Uses(lambda m, x: m.inner(x)[0]),
    "recurrent, time first": lambda: Uses(lambda m, x: m.inner(x.transpose(0, 1))[0].transpose(0, 1)),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
    "bilinear": lambda: Uses(lambda m, x: m.inner(x, x.flip(-1))),
}
_INSIDE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "convolution": ("conv", lambda: nn.Conv1d(D, D, 3, padding=1, groups=2)),
    "recurrent": ("inner", lambda: nn.LSTM(D, D, batch_first=True)),
    "recurrent, time first": ("inner", lambda: nn.GRU(D, D)),
    "bilinear": ("inner", lambda: nn.Bilinear(D, D, D)),
}


def build(kind: str) -> nn.Module:
    module = MODULES[kind]()
    if kind in _INSIDE:
        name, inside = _INSIDE[kind]
        module.add_module(name, inside())
    return module


@norm_strategies
@pytest.mark.parametrize("kind", MODULES)
def test_exact(kind: str, strategy: str) -> None:
    assert exact_or_refused(lambda: Net(build(kind)), x_batch(B, T), strategy) == "exact"


@pytest.mark.parametrize("kind", MODULES)
def test_a_batch_of_one(kind: str) -> None:
    assert exact_or_refused(lambda: Net(build(kind)), x_batch(1, T), "one_pass") == "exact"


@norm_strategies
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["scan", "router", "class token", "read by the module around", "recurrent", "tables", "shared ids"]
)
def test_checkpointed(kind: str, reentrant: bool, strategy: str) -> None:
    def change(model: nn.Module) -> None:
        inside = model.middle
        model.way = lambda _, h: checkpoint(inside, h, use_reentrant=reentrant)

    assert exact_or_refused(lambda: Net(build(kind)), x_batch(B, T), strategy, change) == "exact"


@pytest.mark.parametrize("kind", MODULES)
def test_as_many_rows_as_tokens_or_heads(kind: str) -> None:
    """B = T = 5, and B = 2 heads: what the shapes leave open is refused, never taken the wrong way."""
    for rows in (T, 2):
        exact_or_refused(lambda: Net(build(kind)), x_batch(rows, T), "one_pass")


# --- what must not pass ----------------------------------------------------------------------------------------------


class Hidden(torch.autograd.Function):
    """A kernel that reports to no torch function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum((0, 1))


def shuffled(m: Any, x: Tensor) -> Tensor:
    """The tokens of the batch in another order, as experts see them, and in the batch's again."""
    order = torch.randperm(x.shape[0] * x.shape[1], generator=torch.Generator().manual_seed(3))
    flat = x.reshape(-1, D)[order] * m.gain
    return flat[order.argsort()].view(x.shape)


def selected(m: Any, x: Tensor) -> Tensor:
    """As many tokens as there are rows."""
    flat = x.reshape(-1, D)
    chosen = flat[[0, 1, 7]] @ m.weight
    return x + torch.zeros_like(flat).index_add(0, torch.tensor([0, 1, 7]), chosen).view(x.shape)


def in_place(m: Any, x: Tensor) -> Tensor:
    return x * m.gain.mul_(2)


REFUSED = {
    "custom function": lambda: Uses(lambda m, x: Hidden.apply(x, m.gain), gain=(D,)),
    "custom function of what was computed": lambda: Uses(lambda m, x: Hidden.apply(x, m.gain.exp()), gain=(D,)),
    "other order": lambda: Uses(shuffled, gain=(D,)),
    "a selection": lambda: Uses(selected, weight=(D, D)),
    "changed in place": lambda: Uses(in_place, gain=(D,)),
    "unknown function": lambda: Uses(lambda m, x: torch.cdist(x, m.gain), gain=(D, D)),
    "a mean over the batch": lambda: Uses(lambda m, x: x + (x * m.gain).mean(0, keepdim=True), gain=(D,)),
}


@norm_strategies
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, strategy: str) -> None:
    model = dpft.wrap(seeded(lambda: Net(REFUSED[kind]())), strategy=strategy, isolation="off")
    with pytest.raises((DPFTError, RuntimeError)) as error:
        step(model, strategy, x_batch(B, T))
    assert isinstance(error.value, DPFTError), error.value
    assert all(p.grad is None for p in model.parameters())


@norm_strategies
def test_a_batch_of_one_needs_no_rule(strategy: str) -> None:
    """The gradient of its parameters is the example's, whatever is done with them."""
    make = REFUSED["unknown function"]
    assert exact_or_refused(lambda: Net(make()), x_batch(1, T), strategy) == "exact"


def test_the_forward_is_the_plain_one() -> None:
    """Up to rounding: norms and convolutions are computed in another order."""
    for kind in MODULES:
        plain, model = seeded(lambda k=kind: Net(build(k))), dpft.wrap(seeded(lambda k=kind: Net(build(k))))
        expected, found = losses_of(plain, x_batch(B, T)), losses_of(model, x_batch(B, T))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda m, k=kind: f"{k}: {m}")


def test_memory_of_the_parameters_is_not_multiplied() -> None:
    """The rows' views of a parameter are views."""
    model = dpft.wrap(nn.Sequential(Uses(lambda m, x: x * m.gain, gain=(1 << 16,))))
    x = torch.randn(64, 1, 1 << 16)
    seen = []

    def look(t: Tensor) -> Tensor:
        seen.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        model(x)
    assert math.prod(x.shape) * 4 in seen and sum(size == 4 << 16 for size in seen) >= 1
    assert sum(seen) <= 4 * math.prod(x.shape) + 8 * (4 << 16)
