"""The same numbers in every situation of a training loop: padding, shapes, several calls, evaluation between."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from dpft.errors import DPFTError
from tests import oracle, zoo
from tests.clipping.against_oracle import (
    CHECKPOINTING,
    STRATEGIES,
    Case,
    case_of,
    check,
    check_grads,
    make_case,
    private_loss,
    set_checkpointing,
)

strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def wrapped(case: Case, strategy: str, **more: Any) -> nn.Module:
    return dpft.wrap(case.build(), strategy=strategy, max_grad_norm=case.max_grad_norm, **more)


def factors(case: Case) -> Tensor:
    return case.exact.factors(case.max_grad_norm)


# Eager attention with one padding: the side of the padding is in the mask, which both implementations are given.
@strategies
@pytest.mark.parametrize(
    ("attention", "padding"), [("sdpa", "left"), ("sdpa", "right"), ("sdpa", "none"), ("eager", "left")]
)
@pytest.mark.parametrize("entry", [zoo.LLAMA_GQA, zoo.GEMMA3, zoo.GPT2, zoo.OPT], ids=str)
def test_attention_and_padding(entry: zoo.Entry, attention: str, padding: str, strategy: str) -> None:
    # Absolute positions behind left padding are refused (tests/models/test_isolation.py); the clipping is exact.
    absolute = entry is zoo.GPT2 and padding == "left"
    isolation = "off" if absolute else "default"
    check(case_of(entry, attention=attention, padding=padding), strategy=strategy, isolation=isolation)


def test_no_attention_mask() -> None:
    """`attention_mask` is optional."""
    batch = zoo.token_batch(padding="none")
    del batch["attention_mask"]
    case = make_case(zoo.LLAMA_TIED, batch)
    for strategy in STRATEGIES:
        check(case, strategy=strategy)


@strategies
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("entry", [zoo.LLAMA, zoo.LLAMA_TIED, zoo.GPT2], ids=str)
def test_inputs_embeds(entry: zoo.Entry, checkpointing: str, strategy: str) -> None:
    """Without `input_ids` an untied embedding has no gradient; a tied one has the head's.

    The embeddings require a gradient, as a prompt encoder's would, so that reentrant checkpointing works.
    """
    case = embeds_case(entry)
    model = wrapped(case, strategy)
    set_checkpointing(model, checkpointing)
    batch = dict(case.batch)
    if checkpointing == "reentrant":
        batch["inputs_embeds"] = batch["inputs_embeds"].clone().requires_grad_()
    model(**batch).loss.backward()
    check_grads(case, model, factors(case))
    torch.testing.assert_close(dpft.stats(model).norms.double(), case.exact.norms, rtol=1e-5, atol=0)


@functools.cache
def embeds_case(entry: zoo.Entry) -> Case:
    batch = zoo.token_batch()
    batch["inputs_embeds"] = torch.randn(
        *batch.pop("input_ids").shape, zoo.WIDTH, generator=torch.Generator().manual_seed(3)
    )
    return make_case(entry, batch)


@strategies
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.OPT], ids=str)
def test_example_without_labels(entry: zoo.Entry, strategy: str) -> None:
    """All labels -100: loss 0, gradient 0, norm 0, and the others as they were."""
    batch = zoo.token_batch()
    batch["labels"][1] = -100
    case = make_case(entry, batch)
    assert case.exact.norms[1] == 0
    model = check(case, strategy=strategy)
    assert dpft.stats(model).norms[1] == 0


@strategies
def test_all_examples_without_labels(strategy: str) -> None:
    batch = zoo.token_batch()
    batch["labels"][:] = -100
    for clip in ("abadi", "automatic"):
        model = dpft.wrap(zoo.LLAMA_TIED.build(), strategy=strategy, clip_function=clip)
        loss = model(**batch).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
        assert torch.equal(dpft.stats(model).norms, torch.zeros(4))


@strategies
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2, zoo.OPT], ids=str)
@pytest.mark.parametrize(("examples", "tokens"), [(1, 1), (3, 1), (1, 2), (1, 9), (2, 2)])
def test_smallest_shapes(entry: zoo.Entry, examples: int, tokens: int, strategy: str) -> None:
    """T = 1 leaves nothing to predict: zero, not NaN. B = 1 is a batch."""
    case = case_of(entry, examples=examples, tokens=tokens)
    if tokens > 1:
        check(case, strategy=strategy)
        return
    model = wrapped(case, strategy)
    loss = model(**case.batch).loss
    loss.backward()
    assert loss.item() == 0.0
    assert oracle.relative_error(oracle.grads_of(model), case.exact.weighted_sum([0.0] * examples)) == 0.0
    assert torch.equal(dpft.stats(model).norms, torch.zeros(examples))


@strategies
@pytest.mark.parametrize("entry", [zoo.BERT, zoo.MLP_ENTRY, zoo.MLP_TOKENS], ids=str)
@pytest.mark.parametrize("examples", [1, 2, 5])
def test_shapes_of_clipped_loss(entry: zoo.Entry, examples: int, strategy: str) -> None:
    check(case_of(entry, examples=examples, tokens=3), strategy=strategy)


def sum_of(cases: list[Case]) -> oracle.Grads:
    """The clipped sums added up; all calls share the first case's clip norm, for there is one model."""
    total: oracle.Grads = {}
    for case in cases:
        for name, g in case.exact.clipped_sum(cases[0].max_grad_norm).items():
            total[name] = total.get(name, torch.zeros_like(g)) + g
    return total


# One model meets every kind of checkpointing here; that every model is exact under it is test_gradients.py's.
@strategies
@pytest.mark.parametrize(
    ("entry", "checkpointing"),
    [*((zoo.LLAMA_TIED, kind) for kind in CHECKPOINTING), (zoo.GPT2, "off"), (zoo.BERT, "off")],
    ids=str,
)
@pytest.mark.parametrize("how", ["sum of losses", "two backwards", "two backwards, last first", "accumulate"])
def test_two_calls(entry: zoo.Entry, how: str, checkpointing: str, strategy: str) -> None:
    """Two physical batches of different shape add up, in whatever order forward and backward run."""
    one, two = case_of(entry), case_of(entry, examples=3, tokens=6, seed=5)
    model = wrapped(one, strategy)
    set_checkpointing(model, checkpointing)
    if how == "accumulate":
        private_loss(entry, model, one.batch, strategy).backward()
        private_loss(entry, model, two.batch, strategy).backward()
    else:
        losses = [private_loss(entry, model, case.batch, strategy) for case in (one, two)]
        if how == "sum of losses":
            (losses[0] + losses[1]).backward()
        else:
            for loss in losses if how == "two backwards" else losses[::-1]:
                loss.backward()
    error = oracle.relative_error(oracle.grads_of(model), sum_of([one, two]))
    assert error <= max(c.limit(c.exact.factors(one.max_grad_norm)) for c in (one, two))


@strategies
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_evaluation_between_forward_and_backward(checkpointing: str, strategy: str) -> None:
    """`torch.no_grad` evaluation, and an evaluation mode, change nothing."""
    case, other = case_of(zoo.LLAMA_TIED), case_of(zoo.LLAMA_TIED, examples=2, tokens=5, seed=8)
    model = wrapped(case, strategy)
    set_checkpointing(model, checkpointing)
    loss = model(**case.batch).loss
    with torch.no_grad():
        model.eval()
        evaluated = model(**other.batch).loss
        logits = model(**{k: v for k, v in other.batch.items() if k != "labels"}).logits
        model.train()
    assert not evaluated.requires_grad and not logits.requires_grad
    torch.testing.assert_close(evaluated.double(), other.exact.losses.mean(), rtol=1e-5, atol=0)
    loss.backward()
    check_grads(case, model, factors(case))
    torch.testing.assert_close(dpft.stats(model).norms.double(), case.exact.norms, rtol=1e-5, atol=0)


@strategies
def test_inference_mode_and_generation(strategy: str) -> None:
    """A wrapped model evaluates and generates as before, bit for bit."""
    case = case_of(zoo.LLAMA_TIED)
    plain, model = case.build().eval(), wrapped(case, strategy).eval()
    ids = case.batch["input_ids"][:2, :4]
    with torch.inference_mode():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), model.generate(ids, **options))
    model.train()
    model(**case.batch).loss.backward()
    check_grads(case, model, factors(case))


@strategies
@pytest.mark.parametrize("scale", [0.25, 1024.0])
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.BERT], ids=str)
def test_scaled_loss(entry: zoo.Entry, scale: float, strategy: str) -> None:
    """What an engine multiplies the loss with scales the result, after clipping; norms and factors stay."""
    case = case_of(entry)
    model = wrapped(case, strategy)
    (private_loss(entry, model, case.batch, strategy) * scale).backward()
    check_grads(case, model, factors(case), scale=scale)
    torch.testing.assert_close(dpft.stats(model).norms.double(), case.exact.norms, rtol=1e-5, atol=0)


@strategies
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.BERT], ids=str)
def test_every_step_starts_anew(entry: zoo.Entry, strategy: str) -> None:
    """Nothing of a step leaks into the next one: repeated, it gives the same bits."""
    case = case_of(entry)
    model, seen = wrapped(case, strategy), []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        private_loss(entry, model, case.batch, strategy).backward()
        seen.append((oracle.grads_of(model), dpft.stats(model).norms.clone()))
    for grads, norms in seen[1:]:
        assert torch.equal(norms, seen[0][1])
        assert all(torch.equal(grads[n], seen[0][0][n]) for n in grads)


@strategies
def test_dropped_forward_leaves_nothing(strategy: str) -> None:
    """A forward whose loss is thrown away (an exception, an evaluation with grad on) does not count."""
    case = case_of(zoo.LLAMA_TIED)
    model = wrapped(case, strategy)
    model(**case_of(zoo.LLAMA_TIED, examples=2, tokens=5, seed=8).batch)
    model(**case.batch).loss.backward()
    check_grads(case, model, factors(case))


@strategies
@pytest.mark.parametrize("as_tuple", [False, True])
def test_return_dict(as_tuple: bool, strategy: str) -> None:
    """`return_dict=False` gives a tuple whose first element is the loss."""
    case = case_of(zoo.LLAMA_TIED)
    model = wrapped(case, strategy)
    out = model(**case.batch, return_dict=not as_tuple)
    (out[0] if as_tuple else out["loss"]).backward()
    check_grads(case, model, factors(case))


@strategies
@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_checkpointing_enabled_after_wrap(how: str, strategy: str) -> None:
    case = case_of(zoo.LLAMA_GQA)
    model = wrapped(case, strategy)
    set_checkpointing(model, how)
    model(**case.batch).loss.backward()
    check_grads(case, model, factors(case))


@strategies
def test_frozen_after_wrap_or_refused(strategy: str) -> None:
    """Freezing a layer later is either exact or an error, never a norm of something else."""
    case = case_of(zoo.FROZEN)
    model = dpft.wrap(zoo.LLAMA.build(), strategy=strategy, max_grad_norm=case.max_grad_norm)
    model.get_input_embeddings().weight.requires_grad_(False)
    try:
        model(**case.batch).loss.backward()
    except DPFTError:
        return
    check_grads(case, model, factors(case))


@strategies
def test_dropout_is_the_same_in_both_passes(strategy: str) -> None:
    """With dropout the clipped sum still has norm at most B * C, and two equal seeds give equal bits."""
    case, seen = case_of(zoo.MLP_ENTRY), []
    for _ in range(2):
        model = case.build()
        model.layers.insert(3, nn.Dropout(0.5))
        dpft.wrap(model, strategy=strategy, max_grad_norm=0.1)
        torch.manual_seed(3)
        private_loss(zoo.MLP_ENTRY, model, case.batch, strategy).backward()
        assert bool((dpft.stats(model).clip_factors < 1).all())
        seen.append(oracle.grads_of(model))
    assert all(torch.equal(seen[0][n], seen[1][n]) for n in seen[0])


@strategies
@pytest.mark.parametrize("keep", [[0, 2], [1], [3]])
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.OPT, zoo.BERT, zoo.MLP_ENTRY], ids=str)
def test_example_weight(entry: zoo.Entry, keep: list[int], strategy: str) -> None:
    """Rows of weight 0 are not there: not in the sum, not in the mean loss."""
    case = case_of(entry)
    weight = torch.zeros(4)
    weight[keep] = 1.0
    model = wrapped(case, strategy)
    loss = private_loss(entry, model, case.batch, strategy, weight)
    torch.testing.assert_close(loss.detach().double(), case.exact.losses[keep].mean(), rtol=1e-5, atol=0)
    loss.backward()
    check_grads(case, model, factors(case) * weight)


@strategies
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.BERT], ids=str)
def test_all_rows_of_weight_zero(entry: zoo.Entry, strategy: str) -> None:
    """A physical batch of padding rows only: loss 0, gradient exactly zero."""
    case = case_of(entry)
    model = wrapped(case, strategy)
    loss = private_loss(entry, model, case.batch, strategy, torch.zeros(4))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


@strategies
def test_example_weight_of_nan_rows(strategy: str) -> None:
    """Even a NaN in a row of weight 0 stays out, of the loss too."""
    case = embeds_case(zoo.LLAMA_TIED)
    batch = {k: v.clone() for k, v in case.batch.items()}
    batch["inputs_embeds"][2] = float("nan")
    model = wrapped(case, strategy)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss = model(**batch, example_weight=weight).loss
    assert loss.isfinite()
    loss.backward()
    check_grads(case, model, factors(case) * weight)


@strategies
def test_example_weight_of_another_length(strategy: str) -> None:
    case = case_of(zoo.LLAMA_TIED)
    model = wrapped(case, strategy)
    with pytest.raises((ValueError, DPFTError), match="example_weight"):
        model(**case.batch, example_weight=torch.ones(3)).loss.backward()


@strategies
@pytest.mark.parametrize("bad", [-1.0, 2.0, float("nan"), float("inf")])
def test_example_weight_cannot_raise_the_sensitivity(bad: float, strategy: str) -> None:
    """Outside of [0, 1] it is refused, or clamped; NaN is no example."""
    case = case_of(zoo.LLAMA_TIED)
    model = wrapped(case, strategy)
    try:
        model(**case.batch, example_weight=torch.tensor([1.0, bad, 1.0, 1.0])).loss.backward()
    except (ValueError, DPFTError):
        return
    clamped = torch.tensor([1.0, 1.0 if bad > 1 else 0.0, 1.0, 1.0])
    check_grads(case, model, factors(case) * clamped)
