"""Adapters of PEFT: exact against the float64 oracle, or refused by name and exact one example at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from tests import zoo
from tests.clipping.against_oracle import case_of, check
from tests.models import adapters

peft = pytest.importorskip("peft", reason="peft is an extra of the package")

ENTRIES = {str(entry): entry for entry in adapters.EXACT}
# each uses its parameters in a way of its own; the others, which take a minute together, are slow
EACH_WAY = (
    "DoRA", "LoRA, trainable tokens", "LoRA, modules_to_save", "DeLoRA", "FourierFT", "OFT", "IA3", "VB-LoRA",
    "prompt tuning", "prefix tuning", "P-tuning, MLP",
)  # fmt: skip
ALONE_EACH_WAY = ("AdaLoRA", "LoHa", "TinyLoRA", "LoRA, target_parameters")


def marked(entries: list[Any], fast: tuple[str, ...]) -> list[Any]:
    """As parameters, slow but for those that are named."""
    found = []
    for each in entries:
        values = each if isinstance(each, tuple) else (each,)
        name = str(values[0])
        found.append(pytest.param(*values, id=name, marks=() if name in fast else pytest.mark.slow))
    return found


@pytest.mark.parametrize("strategy", ["auto"])
@pytest.mark.parametrize("entry", marked(adapters.EXACT, EACH_WAY))
def test_exact(entry: zoo.Entry, strategy: str) -> None:
    """The value of the loss, the norms and the clipped sum; no gradient is zero by symmetry."""
    case = case_of(entry)
    assert all(any(grads[name].any() for grads in case.exact.grads) for name in case.exact.grads[0])
    model = check(case, strategy=strategy)
    assert dpft.stats(model).strategy == "one_pass"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("entry", adapters.EXACT, ids=str)
def test_exact_otherwise(entry: zoo.Entry, strategy: str) -> None:
    check(case_of(entry), strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "DeLoRA", "FourierFT", "OFT", "VB-LoRA", "VeRA", "IA3"])
def test_exact_checkpointed(name: str, strategy: str) -> None:
    check(case_of(ENTRIES[name]), "non-reentrant", strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "DeLoRA", "OFT", "prompt tuning"])
@pytest.mark.parametrize("examples", [1, 4])
def test_exact_where_features_look_like_tokens(name: str, examples: int) -> None:
    """Width 32 is a multiple of 4 rows of 8 tokens: an identity [32, 32] is none of the batch."""
    entry = dataclasses.replace(
        ENTRIES[name], batch=lambda examples=examples, **_: zoo.token_batch(examples, 8, seed=3)
    )
    check(case_of(entry), strategy="one_pass")


@pytest.mark.parametrize(("entry", "why"), marked(adapters.ALONE, ALONE_EACH_WAY))
def test_one_example_at_a_time(entry: zoo.Entry, why: str) -> None:
    """Refused by name, with what to do; ``"auto"`` does that, exactly, and says why."""
    for strategy in ("one_pass", "two_pass"):
        with pytest.raises(dpft.DPFTError, match=rf"(?s){why}.*strategy='per_example'|{why}"):
            dpft.wrap(entry.build(), strategy=strategy)(**entry.batch()).loss.backward()  # type: ignore[arg-type]  # one of the literals
    model = check(case_of(entry), strategy="auto")
    assert dpft.stats(model).strategy == "per_example"
    assert "one example at a time" in dpft.explain(model, adapters.EXAMPLES, adapters.TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "why"), adapters.REFUSED, ids=str)
def test_refused(entry: zoo.Entry, why: str) -> None:
    """Hooks that change gradients, and a loss over the batch."""
    with pytest.raises(dpft.DPFTError, match=why):
        model = dpft.wrap(entry.build())
        model(**entry.batch()).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["C3A", "FroD", "LoHa", "RandLoRA", "SHiRA"])
def test_layers_that_are_run_row_by_row(name: str) -> None:
    """What no torch function reports is exact in one pass, too, with ``register_rule(layer, "rows")``."""
    (entry,) = (entry for entry, _ in adapters.ALONE if str(entry) == name)
    kinds: dict[type, type] = {}

    def build(attention: str = "sdpa") -> nn.Module:
        model = entry.build(attention)
        for module in model.modules():
            if type(module).__module__.endswith(".layer"):  # a class of this test's own, as rules are for good
                cls = type(module)
                if cls not in kinds:
                    kinds[cls] = type(cls.__name__, (cls,), {})
                    dpft.register_rule(kinds[cls], "rows")
                module.__class__ = kinds[cls]
        return model

    model = check(case_of(dataclasses.replace(entry, build=build)), strategy="one_pass")
    assert kinds and dpft.stats(model).strategy == "one_pass"


def logits(model: nn.Module) -> Tensor:
    batch = adapters.batch()
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


EXPORTED = [
    "LoRA", "DoRA", "LoRA, modules_to_save", "LoRA, trainable tokens", "IA3", "VeRA", "OFT", "VB-LoRA",
    "prefix tuning", "prompt tuning",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("unwrap", [False, True], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("name", EXPORTED)
def test_export(name: str, unwrap: bool, tmp_path: Path) -> None:
    """What was trained privately is saved, loaded on a fresh base and merged into it, and computes the same."""
    model = ENTRIES[name].build()
    before = logits(model)
    dpft.wrap(model.train(), strategy="one_pass")
    model(**adapters.batch()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3).step()
    model.zero_grad()
    if unwrap:
        dpft.unwrap(model)
    trained: Any = model
    expected = logits(trained)
    assert not torch.allclose(expected, before, atol=1e-3)
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(zoo_base(name), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    if "tuning" not in name:
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
        if unwrap:
            torch.testing.assert_close(logits(trained.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def zoo_base(name: str) -> nn.Module:
    """The model below the adapter, as it was before training."""
    model: Any = ENTRIES[name].build()
    found: nn.Module = model.get_base_model() if "tuning" in name else model.unload()
    return found
