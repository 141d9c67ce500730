"""`dpft.wrap`: the coverage audit, what is refused and how it is said, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpft
from dpft.errors import ClippingError, DPFTError, UnsupportedModuleError, WrapError
from tests import oracle, zoo
from tests.clipping.nets import Net, exact_or_refused, losses_of, no_gradient, seeded, step, x_batch

STRATEGIES = ("one_pass", "two_pass", "per_example")
NORM_STRATEGIES = STRATEGIES[:2]
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
norm_strategies = pytest.mark.parametrize("strategy", NORM_STRATEGIES)


class Experts(nn.Module):
    """A module that is known to see a data-dependent selection of tokens, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        first = x[..., :1] > 0
        return torch.where(first, self.experts[0](x), self.experts[1](x))


# --- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", NORM_STRATEGIES)
def test_every_uncovered_parameter_is_named_with_the_way_out(strategy: str) -> None:
    """One error for all of them, so that nobody fixes them one by one."""
    with pytest.raises(UnsupportedModuleError) as error:
        dpft.wrap(Net(nn.Sequential(Experts(), Experts())), strategy=strategy)
    missing = [f"middle.{i}.experts.{k}.{name}" for i in (0, 1) for k in (0, 1) for name in ("weight", "bias")]
    ways = ["per_example", "requires_grad_(False)", "dpft.register_rule", "Linear"]
    assert all(name in str(error.value) for name in (*missing, *ways))
    assert "first.weight" not in str(error.value)


def test_per_example_takes_any_architecture() -> None:
    assert exact_or_refused(lambda: Net(Experts()), x_batch(), "per_example") == "exact"


@strategies
def test_frozen_uncovered_parameters_are_fine(strategy: str) -> None:
    def make() -> nn.Module:
        model = Net(Experts())
        assert model.middle is not None
        model.middle.requires_grad_(False)
        return model

    assert exact_or_refused(make, x_batch(), strategy) == "exact"


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_is_refused_always(norm: type[nn.Module], strategy: str) -> None:
    """It mixes examples, and its running statistics are released without noise: `per_example` cannot help."""
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        dpft.wrap(Net(norm(5)), strategy=strategy)


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_instance_norm_with_running_statistics_is_refused(strategy: str) -> None:
    with pytest.raises(UnsupportedModuleError, match="InstanceNorm"):
        dpft.wrap(Net(nn.InstanceNorm1d(5, track_running_stats=True)), strategy=strategy)


def test_refusal_leaves_the_model_as_it_was() -> None:
    model = seeded(lambda: Net(Experts()))
    before = set(dir(model))
    with pytest.raises(UnsupportedModuleError):
        dpft.wrap(model, strategy="one_pass")
    assert set(dir(model)) == before
    losses_of(model, x_batch()).sum().backward()
    assert model.first.weight.grad is not None
    dpft.wrap(model, strategy="per_example")


def test_subclass_with_a_forward_of_its_own_is_exact() -> None:
    """A rule found along the MRO must not stand in for another computation."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.linear(x, self.weight.square(), self.bias)

    for strategy in STRATEGIES:
        assert exact_or_refused(lambda: Net(Doubled(6, 6)), x_batch(), strategy) == "exact"


def test_embedding_options_are_exact_or_refused() -> None:
    """`max_norm` changes the weights in forward, `scale_grad_by_freq` the gradient by the batch, `sparse` its type."""

    class Lookup(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6, **options)
            self.last = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.table((x[..., 0].abs() * 4).long().clamp(max=8)))

    assert exact_or_refused(lambda: Lookup(padding_idx=2), x_batch(), "two_pass") == "exact"
    for options in ({"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}):
        for strategy in NORM_STRATEGIES:
            assert exact_or_refused(lambda o=options: Lookup(**o), x_batch(), strategy) == "refused", options


# --- wrap and unwrap ------------------------------------------------------------------------------------------------


@strategies
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2, zoo.BERT, zoo.LORA, zoo.MLP_ENTRY], ids=str)
def test_unwrap_restores_the_plain_model_bitwise(entry: zoo.Entry, strategy: str) -> None:
    """Attributes, forward, gradients and the state dict; parameters are the same objects all along."""
    plain, model, batch = entry.build(), entry.build(), entry.batch()
    params = [id(p) for p in model.parameters()]
    keys = {name: set(vars(m)) for name, m in model.named_modules()}
    dpft.wrap(model, strategy=strategy, max_grad_norm=1.0)
    assert [id(p) for p in model.parameters()] == params
    assert list(model.state_dict()) == list(plain.state_dict())
    if entry.causal:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    assert dpft.unwrap(model) is model
    assert {name: set(vars(m)) for name, m in model.named_modules()} == keys
    for m in (plain, model):
        loss = m(**batch).loss if entry.causal else entry.losses(m, batch).mean()
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    dpft.wrap(model, strategy=strategy)


@strategies
@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
def test_forward_is_bitwise_the_plain_forward(entry: zoo.Entry, strategy: str) -> None:
    """Logits and per-example losses do not change by a bit."""
    batch = entry.batch()
    plain, model = entry.build(), dpft.wrap(entry.build(), strategy=strategy)
    with torch.no_grad():
        assert torch.equal(entry.losses(plain, batch), entry.losses(model, batch))


def test_wrap_twice_is_refused() -> None:
    model = dpft.wrap(zoo.MLP_ENTRY.build())
    with pytest.raises(WrapError, match="unwrap"):
        dpft.wrap(model)
    outer = nn.Sequential(model)
    with pytest.raises(WrapError):
        dpft.wrap(outer)


def test_what_was_never_wrapped() -> None:
    model = zoo.MLP_ENTRY.build()
    losses = zoo.vector_losses(model, zoo.vector_batch())
    for act in (lambda: dpft.unwrap(model), lambda: dpft.stats(model), lambda: dpft.clipped_loss(model, losses)):
        with pytest.raises(WrapError, match="wrap"):
            act()


def test_stats_before_the_first_backward() -> None:
    model = dpft.wrap(zoo.MLP_ENTRY.build())
    with pytest.raises(WrapError):
        dpft.stats(model)


@strategies
def test_all_frozen(strategy: str) -> None:
    """Nothing to train is an error at wrap, not a run that does nothing."""
    model = zoo.LLAMA.build().requires_grad_(False)
    with pytest.raises(DPFTError, match="requires a gradient"):
        dpft.wrap(model, strategy=strategy)


@strategies
def test_partly_frozen(strategy: str) -> None:
    """Bias without weight, weight without bias, norm only."""
    for names in (("first.bias",), ("last.weight",), ("first.weight", "last.bias"), ("middle.bias",)):

        def make(names: tuple[str, ...] = names) -> nn.Module:
            model = Net(nn.LayerNorm(6))
            for name, p in model.named_parameters():
                p.requires_grad_(name in names)
            return model

        assert exact_or_refused(make, x_batch(), strategy) == "exact"


def test_models_do_not_share_state() -> None:
    """Two wrapped models, interleaved, keep their own norms."""
    one, two = dpft.wrap(seeded(Net), max_grad_norm=1.0), dpft.wrap(seeded(Net), max_grad_norm=1.0)
    a, b = losses_of(one, x_batch()), losses_of(two, x_batch(examples=2))
    dpft.clipped_loss(two, b).backward()
    dpft.clipped_loss(one, a).backward()
    assert len(dpft.stats(one).norms) == 3 and len(dpft.stats(two).norms) == 2


# --- the model changed behind our back -------------------------------------------------------------------------------


@strategies
def test_replaced_parameter_is_noticed(strategy: str) -> None:
    """Opacus issue 820: epsilon accrued, weights did not move."""
    model = dpft.wrap(seeded(Net), strategy=strategy)
    step(model, strategy)
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    with pytest.raises(WrapError, match=r"first\.weight"):
        step(model, strategy)


@strategies
def test_added_parameters_are_noticed(strategy: str) -> None:
    """PEFT, or a new head, after wrap."""
    model = dpft.wrap(seeded(Net), strategy=strategy)
    model.middle = nn.Linear(6, 6)
    with pytest.raises(DPFTError, match="middle"):
        step(model, strategy)


@strategies
def test_replaced_layer_is_noticed(strategy: str) -> None:
    model = dpft.wrap(seeded(Net), strategy=strategy)
    model.last = nn.Linear(6, 6)
    with pytest.raises(DPFTError, match="last"):
        step(model, strategy)


@strategies
def test_peft_after_wrap_is_noticed(strategy: str) -> None:
    import peft

    model = dpft.wrap(zoo.LLAMA.build(), strategy=strategy)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(DPFTError):
        adapted(**zoo.token_batch()).loss.backward()


@strategies
def test_unfrozen_after_wrap_is_exact_or_refused(strategy: str) -> None:
    batch = zoo.token_batch()
    exact = oracle.oracle(zoo.LLAMA.build(), batch)
    model = dpft.wrap(zoo.FROZEN.build(), strategy=strategy, max_grad_norm=1.0)
    model.requires_grad_(True)
    try:
        model(**batch).loss.backward()
    except DPFTError:
        return
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(1.0)) < 1e-5


@strategies
def test_retied_after_wrap_is_exact_or_refused(strategy: str) -> None:
    batch = zoo.token_batch()
    model = dpft.wrap(zoo.LLAMA.build(), strategy=strategy, max_grad_norm=1.0)
    model.lm_head.weight = model.get_input_embeddings().weight
    exact = oracle.oracle(copy_of_tied(), batch)
    try:
        model(**batch).loss.backward()
    except DPFTError:
        return
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(1.0)) < 1e-5


def copy_of_tied() -> nn.Module:
    model = zoo.LLAMA.build()
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def test_errors_are_one_family() -> None:
    for error in (UnsupportedModuleError, WrapError, ClippingError):
        assert issubclass(error, DPFTError)
    assert not issubclass(DPFTError, ValueError)


def test_deepcopy_and_pickle_of_a_wrapped_model(tmp_path: Any) -> None:
    """A copy is a model of its own (an EMA, a reference model) or it is refused; it never trains the original."""
    model = dpft.wrap(seeded(Net), max_grad_norm=1.0)
    try:
        twin = copy.deepcopy(model)
        step(twin, "auto")
    except (DPFTError, TypeError, RuntimeError):
        assert no_gradient(model)
        return
    assert no_gradient(model)
    assert not no_gradient(twin)
