"""`WeightEMA`: the average of the weights after each release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dpft
from dpft.errors import WrapError
from tests.training import Training, new_accelerator, values


def averaged(trajectory: list[Tensor], decay: float, warm_up: bool) -> Tensor:
    """Of the weights before the first release and after each, as one sum with its weights written out."""
    decays = [min(decay, (1 + t) / (10 + t)) if warm_up else decay for t in range(len(trajectory) - 1)]
    factors = []
    for i in range(len(trajectory)):
        factor = 1.0 if i == 0 else 1 - decays[i - 1]
        for later in decays[i:]:
            factor *= later
        factors.append(factor)
    assert sum(factors) == pytest.approx(1)
    return torch.stack([f * w for f, w in zip(factors, trajectory, strict=True)]).sum(0)


@pytest.mark.parametrize(("decay", "warm_up"), [(0.9999, True), (0.15, True), (0.9, False), (0.0, True)])
def test_it_is_the_written_out_average(decay: float, warm_up: bool, tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger.jsonl")
    ema = dpft.WeightEMA(training.accelerator, training.model, training.optimizer, decay, warm_up)
    trajectory = [values(training.model)]
    for _ in training.physical():
        if training.loader.is_last:
            trajectory.append(values(training.model))
    training.close()
    assert ema.updates == 3 and len(trajectory) == 4
    with ema.applied():
        torch.testing.assert_close(values(training.model), averaged(trajectory, decay, warm_up), rtol=1e-5, atol=1e-6)
    assert torch.equal(values(training.model), trajectory[-1])


def test_it_changes_nothing_of_the_training(tmp_path: Path) -> None:
    with_it, without = (Training(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    ema = dpft.WeightEMA(with_it.accelerator, with_it.model, with_it.optimizer)
    for _ in with_it.physical():
        with ema.applied():
            pass
    without.train()
    assert torch.equal(values(with_it.model), values(without.model))
    with_it.close()
    without.close()


def test_frozen_parameters_are_not_kept(tmp_path: Path) -> None:
    from tests.training import tiny_llama

    model = tiny_llama()
    model.get_input_embeddings().weight.requires_grad_(False)
    training = Training(tmp_path / "ledger.jsonl", model=model)
    ema = dpft.WeightEMA(training.accelerator, training.model, training.optimizer)
    kept = ema.state_dict()["averages"]
    assert "model.embed_tokens.weight" not in kept
    assert len(kept) == sum(p.requires_grad for p in model.parameters())
    training.close()


def resumed(folder: Path, ledger: Path, decay: float) -> tuple[Training, Any]:
    training = Training(ledger, accelerator=new_accelerator())
    ema = dpft.WeightEMA(training.accelerator, training.model, training.optimizer, decay)
    if folder.exists():
        training.accelerator.load_state(str(folder))
    return training, ema


def test_a_resume_goes_on_with_the_average(tmp_path: Path) -> None:
    """Its noise and draws are new, so that the average is compared with what follows from the weights."""
    training, ema = resumed(tmp_path / "state", tmp_path / "ledger.jsonl", 0.5)
    trajectory = [values(training.model)]
    for _ in training.physical():
        if training.loader.is_last:
            trajectory.append(values(training.model))
            if len(trajectory) == 3:
                break
    training.optimizer.zero_grad()
    training.accelerator.save_state(str(tmp_path / "state"))
    before = ema.state_dict()
    training.close()
    training, ema = resumed(tmp_path / "state", tmp_path / "ledger.jsonl", 0.5)
    after = ema.state_dict()
    assert after["updates"] == before["updates"] == 2
    assert all(torch.equal(after["averages"][name], a) for name, a in before["averages"].items())
    training.train()
    trajectory.append(values(training.model))
    training.close()
    with ema.applied():
        torch.testing.assert_close(values(training.model), averaged(trajectory, 0.5, True), rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_neither_trained_nor_saved_as_the_models(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger.jsonl")
    ema = dpft.WeightEMA(training.accelerator, training.model, training.optimizer)
    training.one_batch()
    before = values(training.model)
    with ema.applied():
        with pytest.raises(WrapError, match="was to be trained"):
            training.optimizer.step()
        with pytest.raises(WrapError, match="was to be saved"):
            training.accelerator.save_state(str(tmp_path / "state"))
        with pytest.raises(WrapError, match="was to be applied again"), ema.applied():
            pass
    assert training.run.steps == 0 and torch.equal(values(training.model), before)
    training.optimizer.step()
    assert training.run.steps == 1 and ema.updates == 1
    training.close()


def test_what_is_not_of_prepare_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger.jsonl")
    accelerator, model, optimizer = training.accelerator, training.model, training.optimizer
    with pytest.raises(WrapError, match="a SGD and a model"):
        dpft.WeightEMA(accelerator, model, training.inner)
    with pytest.raises(ValueError, match="decay=1"):
        dpft.WeightEMA(accelerator, model, optimizer, decay=1)
    ema = dpft.WeightEMA(accelerator, model, optimizer)
    state = ema.state_dict()
    del state["averages"]["lm_head.weight"]
    with pytest.raises(ValueError, match="averages of"):
        ema.load_state_dict(state)
    training.close()
