"""The clipped sum against the float64 oracle: every model, strategy, mode, precision and kind of checkpointing."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dpft
from tests import zoo
from tests.clipping.against_oracle import (
    CHECKPOINTING,
    MODES,
    STRATEGIES,
    autocast,
    case_of,
    check,
    check_grads,
    set_checkpointing,
)

BF16_MODELS = (zoo.LLAMA_TIED, zoo.LLAMA_GQA, zoo.GEMMA, zoo.GPT2, zoo.OPT, zoo.BERT, zoo.LORA, zoo.MLP_TOKENS)
STRATEGY_OF_MODE = {"ghost": "two_pass", "fast": "two_pass", "per_sample": "one_pass"}


def skip_uncheckpointable(entry: zoo.Entry, checkpointing: str) -> None:
    if checkpointing != "off" and not entry.checkpointing:
        pytest.skip("not a Hugging Face model: nothing to turn checkpointing on with")


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
def test_float32(entry: zoo.Entry, strategy: str, checkpointing: str) -> None:
    """At most 1e-5, and at most twice plain PyTorch's error."""
    skip_uncheckpointable(entry, checkpointing)
    check(case_of(entry), checkpointing, strategy=strategy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
def test_modes(entry: zoo.Entry, mode: str) -> None:
    """The five modes give the same clipped sum; `none` gives the plain one."""
    check(case_of(entry), clipping=mode)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.GPT2], ids=str)
def test_modes_checkpointed(entry: zoo.Entry, mode: str, checkpointing: str) -> None:
    check(case_of(entry), checkpointing, clipping=mode)


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_strategy_with_flash(strategy: str) -> None:
    """`flash` takes every strategy."""
    check(case_of(zoo.LLAMA), clipping="flash", strategy=strategy)


@pytest.mark.parametrize("mode", STRATEGY_OF_MODE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_of_a_mode(mode: str, strategy: str) -> None:
    """ghost and fast are two-pass, per_sample is one-pass; a contradiction is the user's error."""
    model = zoo.LLAMA.build()
    if strategy == STRATEGY_OF_MODE[mode]:
        check(case_of(zoo.LLAMA), clipping=mode, strategy=strategy)
    else:
        with pytest.raises(ValueError, match=strategy):
            dpft.wrap(model, clipping=mode, strategy=strategy)
        dpft.wrap(model, clipping=mode)  # and it left nothing behind


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", [zoo.LLAMA_TIED, zoo.BERT, zoo.MLP_ENTRY], ids=str)
def test_automatic_clipping(entry: zoo.Entry, strategy: str) -> None:
    """C / (norm + gamma)."""
    check(case_of(entry), strategy=strategy, clip_function="automatic", clip_gamma=0.5)


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_or_none_clipped(strategy: str, max_grad_norm: float) -> None:
    case = case_of(zoo.LLAMA_TIED)
    model = case.build()
    dpft.wrap(model, strategy=strategy, max_grad_norm=max_grad_norm)
    model(**case.batch).loss.backward()
    check_grads(case, model, case.exact.factors(max_grad_norm))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", BF16_MODELS, ids=str)
def test_bf16_parameters(entry: zoo.Entry, strategy: str, checkpointing: str) -> None:
    """Pure bf16: at most twice plain PyTorch's error; norms and factors stay float32."""
    skip_uncheckpointable(entry, checkpointing)
    if checkpointing != "off" and entry not in (zoo.LLAMA_TIED, zoo.GPT2):
        pytest.skip("two models are enough here")
    check(case_of(entry, dtype=torch.bfloat16), checkpointing, strategy=strategy)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("entry", BF16_MODELS, ids=str)
def test_autocast_bf16(entry: zoo.Entry, strategy: str, checkpointing: str) -> None:
    """float32 parameters under `torch.autocast`: at most twice plain PyTorch's error."""
    skip_uncheckpointable(entry, checkpointing)
    if checkpointing != "off" and entry not in (zoo.LLAMA_TIED, zoo.GPT2):
        pytest.skip("two models are enough here")
    check(case_of(entry, context=autocast), checkpointing, strategy=strategy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_modes_in_bf16(mode: str, precision: str) -> None:
    if precision == "bf16":
        check(case_of(zoo.LLAMA_TIED, dtype=torch.bfloat16), clipping=mode)
    else:
        check(case_of(zoo.LLAMA_TIED, context=autocast), clipping=mode)


def test_modes_agree_with_each_other() -> None:
    """Not only with the oracle: the same norms to float32's rounding."""
    case, norms = case_of(zoo.LLAMA_TIED), []
    for mode in MODES[:4]:
        model = case.build()
        dpft.wrap(model, clipping=mode, max_grad_norm=case.max_grad_norm)
        model(**case.batch).loss.backward()
        norms.append(dpft.stats(model).norms)
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kept", ["checkpointed", "on the CPU"])
def test_a_hook_on_saved_tensors_does_not_round_the_sum(strategy: str, kept: str) -> None:
    """A float32 gradient of bf16 weights is the same to the bit, though the site's saved weight has lost its wish."""
    found = []
    for hooked in (False, True):
        model = zoo.LLAMA.build().bfloat16()
        for p in model.parameters():
            p.grad_dtype = torch.float32  # as DPOptimizer sets it
        if hooked and kept == "checkpointed":
            set_checkpointing(model, "non-reentrant")
        dpft.wrap(model, strategy=strategy, loss_chunk=None)
        with torch.autograd.graph.save_on_cpu() if hooked and kept == "on the CPU" else contextlib.nullcontext():
            loss = model(**case_of(zoo.LLAMA).batch).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)
    assert strategy == "per_example" or not torch.equal(found[0], found[0].bfloat16().float())
