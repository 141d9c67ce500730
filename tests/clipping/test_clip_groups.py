"""Groups of parameters that are clipped apart: the sum, its sensitivity, and that nothing is kept between groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dpft
from dpft.clipping.clip_groups import make_groups
from dpft.clipping.groupwise import GroupwisePass
from dpft.clipping.passes import KeepPass
from dpft.clipping.strategies import Job
from dpft.errors import ClippingError
from tests import oracle, zoo
from tests.clipping.against_oracle import FLOAT32_LIMIT, OF_PLAIN, autocast, case_of, private_loss, set_checkpointing
from tests.clipping.test_sensitivity import ADVERSARY, few, magnitude

SLACK = 1e-6
STRATEGIES = ("one_pass", "per_example")


def labels(spec: Any, names: list[str]) -> dict[str, str]:
    """The group of each parameter, by the definition."""
    if spec == "layer":
        return {name: name.rpartition(".")[0] for name in names}
    return {name: max((label for label in spec if name.startswith(label)), key=len) for name in names}


def bounds(spec: Any, groups: set[str], clip_norm: float) -> dict[str, float]:
    weights = {label: 1.0 if spec == "layer" else float(spec[label]) for label in groups}
    return {label: clip_norm * w / math.hypot(*weights.values()) for label, w in weights.items()}


def norm_of(grads: Mapping[str, Tensor], names: list[str]) -> float:
    return math.sqrt(sum(float(grads[name].double().square().sum()) for name in names))


def members(spec: Any, names: list[str]) -> dict[str, list[str]]:
    of = labels(spec, names)
    return {label: [n for n in names if of[n] == label] for label in dict.fromkeys(of.values())}


def clipped_apart(
    exact: oracle.PerExample, spec: Any, clip_norm: float, function: str = "abadi", gamma: float = 0.01
) -> oracle.Grads:
    """The sum by its definition, one example and one group at a time, in float64."""
    names = list(exact.grads[0])
    parts = members(spec, names)
    most = bounds(spec, set(parts), clip_norm)
    total = {n: torch.zeros_like(g) for n, g in exact.grads[0].items()}
    for grads in exact.grads:
        for label, inside in parts.items():
            norm = norm_of(grads, inside)
            factor = (
                most[label] / (norm + gamma) if function == "automatic" else min(1.0, most[label] / max(norm, 1e-300))
            )
            for name in inside:
                total[name] += factor * grads[name]
    return total


def summed(entry: zoo.Entry, batch: Any, backwards: int = 1, ckpt: str = "off", **wrap: Any) -> oracle.Grads:
    model = entry.build()
    set_checkpointing(model, ckpt)
    dpft.wrap(model, **wrap)
    for _ in range(backwards):
        model.zero_grad()
        private_loss(entry, model, batch, wrap.get("strategy", "auto")).backward()
    return oracle.grads_of(model)


BY_NAME = {"": 1.0, "model.layers.0.": 0.5, "model.layers.0.self_attn": 2.0}


FIRST = (zoo.LLAMA_TIED, zoo.GPT2, zoo.BERT, zoo.LORA, zoo.MLP_TOKENS)


@pytest.mark.parametrize(
    "entry", [e if e in FIRST else pytest.param(e, marks=pytest.mark.slow) for e in zoo.ZOO], ids=str
)
def test_oracle(entry: zoo.Entry) -> None:
    """Every kind of layer. The isolation check has come in the first backward, and has not in the third."""
    case = case_of(entry)
    expected = clipped_apart(case.exact, "layer", case.max_grad_norm)
    for strategy, backwards in (("one_pass", 1), ("one_pass", 3), ("per_example", 1)):
        if strategy == "one_pass" or entry in (zoo.LLAMA_TIED, zoo.BERT):  # it knows no layers
            got = summed(
                entry, case.batch, backwards, strategy=strategy, clip_groups="layer", max_grad_norm=case.max_grad_norm
            )
            assert oracle.relative_error(got, expected) <= FLOAT32_LIMIT


AUTOMATIC = {"clip_function": "automatic", "clip_gamma": 0.3}


@pytest.mark.parametrize(
    ("spec", "ckpt", "clipping", "clip"),
    [
        ("layer", "non-reentrant", "flash", {}),
        (BY_NAME, "reentrant", "flash", {}),
        (BY_NAME, "off", "per_sample", AUTOMATIC),
        ("layer", "off", "flash", AUTOMATIC),
    ],
)
def test_specs_checkpoints_and_clip_functions(spec: Any, ckpt: str, clipping: str, clip: dict[str, Any]) -> None:
    case = case_of(zoo.LLAMA_TIED)
    expected = clipped_apart(case.exact, spec, 0.2, clip.get("clip_function", "abadi"), clip.get("clip_gamma", 0.0))
    got = summed(zoo.LLAMA_TIED, case.batch, 3, ckpt, clip_groups=spec, max_grad_norm=0.2, clipping=clipping, **clip)
    assert oracle.relative_error(got, expected) <= FLOAT32_LIMIT


@pytest.mark.parametrize("examples", [1, 2, 7])
def test_batches_and_accumulation(examples: int) -> None:
    """Two physical batches add up in `.grad`, which groups are delivered to in the midst of the backward."""
    case = case_of(zoo.LLAMA, examples=examples, seed=5)
    expected = clipped_apart(case.exact, "layer", 0.3)
    model = dpft.wrap(zoo.LLAMA.build(), clip_groups="layer", max_grad_norm=0.3)
    for _ in range(2):
        private_loss(zoo.LLAMA, model, case.batch, "auto").backward()
    got = {name: g / 2 for name, g in oracle.grads_of(model).items()}
    assert oracle.relative_error(got, expected) <= FLOAT32_LIMIT
    stats = dpft.stats(model)
    torch.testing.assert_close(stats.norms.double(), case.exact.norms, rtol=1e-5, atol=0)
    of = labels("layer", list(expected))
    share = bounds("layer", set(of.values()), 0.3)
    smallest = [
        min(1.0, *(share[g] / norm_of(grads, [n for n in of if of[n] == g]) for g in share))
        for grads in case.exact.grads
    ]
    torch.testing.assert_close(stats.clip_factors.double(), torch.tensor(smallest).double(), rtol=1e-5, atol=0)


def test_bf16() -> None:
    case = case_of(zoo.LLAMA_TIED, context=autocast)
    expected = clipped_apart(case.exact, "layer", 0.2)
    model = dpft.wrap(case.build(), clip_groups="layer", max_grad_norm=0.2)
    with autocast():
        loss = private_loss(zoo.LLAMA_TIED, model, case.batch, "auto")
    loss.backward()
    # Of the plain gradient: no weighting makes the error of single groups smaller.
    limit = OF_PLAIN * oracle.plain_error(case.plain, case.batch, case.exact, case.entry.losses, None, autocast)
    assert oracle.relative_error(oracle.grads_of(model), expected) <= limit


class Reused(nn.Module):
    """A layer, and a norm, that are used twice: each is complete when both gradients have come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.twice(self.first(x))))
        return self.last(self.norm(torch.tanh(self.twice(x))))


def reused_losses(model: nn.Module, batch: oracle.Batch) -> Tensor:
    return model(batch["x"]).square().sum(-1)


REUSED = zoo.Entry(
    "reused", zoo.seeded(lambda a: Reused()), zoo.vector_batch, reused_losses, causal=False, checkpointing=False
)


@pytest.mark.parametrize("spec", ["layer", {"": 1, "twice.weight": 3}], ids=["layer", "names"])
def test_layers_that_are_used_twice(spec: Any) -> None:
    batch = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(0))}
    exact = oracle.oracle(REUSED.build(), batch, REUSED.losses)
    for strategy in STRATEGIES:
        got = summed(REUSED, batch, 3, strategy=strategy, clip_groups=spec, max_grad_norm=0.5)
        assert oracle.relative_error(got, clipped_apart(exact, spec, 0.5)) <= FLOAT32_LIMIT


# --- the sensitivity


@pytest.mark.parametrize("spec", ["layer", BY_NAME], ids=["layer", "names"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neighbours(strategy: str, spec: Any) -> None:
    """An example more moves each group by at most its norm, and the whole sum by at most C; all are clipped: by C."""
    entry, clip_norm = zoo.LLAMA_TIED, 1e-3
    batch = entry.batch(examples=5, seed=11)
    wrap = {"strategy": strategy, "clip_groups": spec, "max_grad_norm": clip_norm}
    with_it, without = summed(entry, batch, **wrap), summed(entry, oracle.rows(batch, range(4)), **wrap)
    moved = {n: with_it[n].double() - without[n].double() for n in with_it}
    parts = members(spec, list(moved))
    most = bounds(spec, set(parts), clip_norm)
    for label, inside in parts.items():
        assert norm_of(moved, inside) <= most[label] * (1 + 1e-5)  # a difference of two sums in float32
    assert 0.99 * clip_norm <= norm_of(moved, list(moved)) <= clip_norm * (1 + 1e-5)
    alone = summed(entry, oracle.row(batch, 4), **wrap)
    assert norm_of(alone, list(alone)) <= clip_norm * (1 + SLACK)


@hypothesis.given(
    strategy=st.sampled_from(STRATEGIES),
    clip=st.sampled_from([{}, {"clip_function": "automatic", "clip_gamma": 1e-6}]),
    clip_norm=st.sampled_from([1e-4, 1.0, 100.0]),
    inputs=magnitude,
    losses=magnitude,
    seed=st.integers(0, 3),
)
@hypothesis.settings(few, max_examples=12)
def test_adversarial_example(
    strategy: str, clip: dict[str, Any], clip_norm: float, inputs: float, losses: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    batch = {"x": torch.randn(3, 4, generator=g), "scale": torch.ones(3)}
    batch["x"][-1] *= inputs
    batch["scale"][-1] = losses
    wrap = {"strategy": strategy, "clip_groups": "layer", "max_grad_norm": clip_norm, **clip}
    with_it, without = summed(ADVERSARY, batch, **wrap), summed(ADVERSARY, oracle.rows(batch, range(2)), **wrap)
    assert all(bool(t.isfinite().all()) for t in with_it.values())
    moved = {n: with_it[n].double() - without[n].double() for n in with_it}
    assert norm_of(moved, list(moved)) <= clip_norm * (1 + SLACK)


# --- one pass, and nothing kept


def test_one_traversal_and_nothing_kept_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held when a gradient arrives is one layer's; one-pass holds all layers' at the end."""
    entry, held, traversals = zoo.LLAMA, {"groups": [0], "whole": [0]}, []

    def size(running: KeepPass) -> int:
        return sum(t.numel() * t.element_size() for t in running.holds().kept)

    for which, cls in (("groups", GroupwisePass), ("whole", KeepPass)):
        matrix = cls.matrix

        def watched(self: Any, *args: Any, matrix: Any = matrix, which: str = which) -> None:
            if (which == "groups") == isinstance(self, GroupwisePass):
                held[which].append(size(self))
            matrix(self, *args)

        monkeypatch.setattr(cls, "matrix", watched)
    traverse = Job.traverse
    monkeypatch.setattr(
        Job,
        "traverse",
        lambda self, running, *a, **k: (traversals.append(type(running)), traverse(self, running, *a, **k))[1],
    )
    for groups in ("layer", None):
        model = dpft.wrap(entry.build(), strategy="one_pass", clip_groups=groups, loss_chunk=None)
        for _ in range(3):
            for passes in (held["groups"], held["whole"], traversals):
                passes.clear()
            private_loss(entry, model, entry.batch(), "one_pass").backward()
        if groups == "layer":
            assert traversals == [GroupwisePass]
            kept_by_groups = max(held["groups"])
    largest = max(p.numel() for p in model.parameters()) * 4 * 4  # four examples in float32
    assert kept_by_groups == 0 < largest < max(held["whole"])


def test_a_gradient_after_its_group_was_complete_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph showed one use fewer: what came late would be added to a sum that is weighted already."""
    from dpft.clipping import strategies

    counted = strategies.count_uses
    monkeypatch.setattr(
        strategies, "count_uses", lambda *a: Counter({name: min(1, n) for name, n in counted(*a).items()})
    )
    batch = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(0))}
    model = dpft.wrap(REUSED.build(), strategy="one_pass", clip_groups="layer")
    with pytest.raises(ClippingError, match="after its clip group was complete"):
        private_loss(REUSED, model, batch, "one_pass").backward()


class Mixing(nn.Module):
    """Batch statistics: an example's gradient is in the others' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x - x.mean(0))


def test_mixed_examples_are_refused_before_a_group_is_delivered() -> None:
    model = dpft.wrap(Mixing(), strategy="one_pass", clip_groups="layer", isolation="off")
    loss = dpft.clipped_loss(model, model(torch.randn(4, 4)).square().sum(1))
    with pytest.raises(ClippingError, match="other examples' rows"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backwards", [1, 3])
def test_what_else_reaches_a_parameter_is_refused(backwards: int) -> None:
    """A term besides the clipped losses, a hook that changes a gradient: also where groups go to `.grad` at once."""
    for wrong in ("term", "hook"):
        model = dpft.wrap(zoo.LLAMA.build(), clip_groups="layer")
        for last in range(backwards):
            model.zero_grad()
            loss = private_loss(zoo.LLAMA, model, zoo.LLAMA.batch(), "auto")
            if last + 1 < backwards:
                loss.backward()
        weight = model.get_parameter("lm_head.weight")
        if wrong == "hook":
            weight.register_hook(lambda grad: 2 * grad)
        with pytest.raises(ClippingError):
            (loss + weight.square().sum() if wrong == "term" else loss).backward()


def test_hooks_after_accumulation_see_the_clipped_gradient() -> None:
    model, seen = dpft.wrap(zoo.LLAMA.build(), clip_groups="layer", max_grad_norm=0.1), []
    weight = model.get_parameter("lm_head.weight")
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
    for _ in range(3):
        model.zero_grad()
        private_loss(zoo.LLAMA, model, zoo.LLAMA.batch(), "auto").backward()
    assert len(seen) == 3 and 0 < max(seen) <= 0.1 * 4


# --- the specification


def test_shares_and_groups() -> None:
    groups = make_groups({"": 3.0, "a.": 4.0}, ["a.x", "b.x", "a.y"])
    assert groups.members() == [["b.x"], ["a.x", "a.y"]] and groups.shares == (0.6, 0.8)
    layers = make_groups("layer", ["a.weight", "a.bias", "scale", "b.c.weight"])
    assert layers.names == ("a", "", "b.c") and math.hypot(*layers.shares) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "two_pass"}, "groups are clipped in one pass"),
        ({"clipping": "ghost"}, "groups are clipped in one pass"),
        ({"clipping": "none"}, "groups are clipped in one pass"),
        ({"clip_groups": {"first": 1.0}}, "no group has the parameter 'last.weight'"),
        ({"clip_groups": {"": 1.0, "nothing": 1.0}}, "no trainable parameter begins with 'nothing'"),
        ({"clip_groups": {"": 0.0}}, "expected 'layer', or a finite weight"),
        ({"clip_groups": "module"}, "expected 'layer', or a finite weight"),
        ({"clip_groups": {}}, "expected 'layer', or a finite weight"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpft.wrap(Mixing(), **{"clip_groups": "layer", **options})


def test_explained() -> None:
    model = dpft.wrap(zoo.LLAMA.build(), clip_groups="layer")
    assert "clip groups, each weighted when its backward is complete" in dpft.explain(model, 4, 9)
