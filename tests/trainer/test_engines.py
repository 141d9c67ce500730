"""Trainer in one process, DDP, FSDP2 and ZeRO-2: the weights of a plain loop, and a resume after SIGKILL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import zoo
from tests.engines.launching import launch, succeed
from tests.trainer.trainer_worker import EXAMPLES, PRIVACY, SAVED, STEPS, examples, two_rows

WORKER = Path(__file__).with_name("trainer_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2"])
def test_engine(engine: str, tmp_path: Path) -> None:
    """One test for each, as its launches follow one another."""

    def run(way: str, folder: str, fails: bool = False) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        done = launch(engine, WORKER, str(tmp_path / folder), way, scratch=tmp_path)
        if fails:
            assert done.returncode != 0, done.stdout[-2000:]
            return {}
        succeed(done)
        facts: dict[str, Any] = json.loads((tmp_path / folder / f"{way}.json").read_text())
        return facts

    assert run("loop", "loop")["ledger"] == STEPS
    facts = run("trainer", "trainer")
    assert facts["ledger"] == facts["global step"] == len(facts["logged"]) == STEPS
    expected, found = (torch.load(tmp_path / way / f"{way}.pt", weights_only=True) for way in ("loop", "trainer"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    # plain transformers loads what Trainer saved
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trainer" / "saved").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=1e-7)

    run("killed", "again", fails=True)
    resumed = run("resumed", "again")
    # the checkpoint has 2 steps and the ledger 3: the one that is lost stays spent, and the budget ends the training
    assert resumed["ledger"] == STEPS and resumed["global step"] == STEPS - 1
    assert resumed["rates"][-1] == pytest.approx(facts["rates"][SAVED])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_examples_of_two_rows(engine: str, tmp_path: Path) -> None:
    """Against the float64 oracle: the gradient of both rows' losses, clipped together."""
    model = zoo.LLAMA.build().double()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for item in examples():
        rows = {name: value for name, value in two_rows([item]).items() if name != "example_ids"}
        losses = [model(**{name: value[i : i + 1] for name, value in rows.items()}).loss for i in range(2)]
        grads = torch.autograd.grad(losses[0] + losses[1], list(parameters.values()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert norm > PRIVACY.max_grad_norm
        for name, g in zip(parameters, grads, strict=True):
            total[name] += g * (PRIVACY.max_grad_norm / norm) / EXAMPLES
    succeed(launch(engine, WORKER, str(tmp_path), "pairs", scratch=tmp_path))
    for strategy in ("one_pass", "two_pass", "per_example"):
        found = torch.load(tmp_path / f"{strategy}.pt", weights_only=True)
        for name, p in parameters.items():
            torch.testing.assert_close(p.detach() - found[name].double(), total[name], rtol=1e-4, atol=2e-6)
