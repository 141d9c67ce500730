"""`dpft.prepare` with correlated noise: noise and draws of a whole training, over resumes, and what is refused.

All labels are -100, so every example's gradient is zero and what is released *is* the noise.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpft
from dpft import LedgerError
from dpft.privacy import Ledger
from tests.training import EXAMPLES, Training, config, examples, values

STEPS = 8
BANDMF: dict[str, Any] = {
    **{"mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson"},
    **{"num_steps": STEPS, "expected_batch_size": 2},
}
BLT: dict[str, Any] = {
    **{"mechanism": "blt", "buffers": 2, "sampler": "fixed_order"},
    **{"num_steps": STEPS, "expected_batch_size": 3},
}
both = pytest.mark.parametrize("changes", [BANDMF, BLT], ids=["bandmf", "blt"])
# Bounds on statistics of runs that are not seeded: beyond 6 standard errors in one of a million of them.
SIGMAS = 6.0


class Seen:
    """Examples without a gradient that remember when they were drawn."""

    def __init__(self) -> None:
        self.items = [{**item, "labels": torch.full_like(item["labels"], -100)} for item in examples()]
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.drawn.append(index)
        return self.items[index]


def train(path: Path, changes: dict[str, Any], steps: int | None = None, **options: Any) -> tuple[Training, Any, Any]:
    """Some steps; the training, the releases times the divisor ``[steps, parameters]``, the examples of each step."""
    dataset = Seen()
    training = Training(path, dataset=dataset, changes=changes, **{"test_seed": None, **options})
    dataset.drawn.clear()
    rows: list[np.ndarray] = []
    drawn: list[set[int]] = [set()]
    for batch in training.physical():
        count = int((batch["example_weight"] > 0).sum())
        drawn[-1] |= set(dataset.drawn[:count])
        dataset.drawn.clear()
        if training.loader.is_last:
            parts = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
            rows.append(torch.cat(parts).double().numpy() * changes["expected_batch_size"])
            drawn.append(set())
            if len(rows) == steps:
                break
    training.optimizer.zero_grad()
    return training, np.array(rows), drawn[:-1]


def whiteness(rows: np.ndarray, training: Training) -> float:
    """How far C w / (sigma C scale) is from independent standard normal values, in standard errors."""
    strategy = training.run.schedule.strategy
    assert strategy is not None
    c, n = strategy.coefficients(), strategy.steps
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    schedule = training.run.schedule
    white = matrix @ rows / (schedule.noise_multiplier * schedule.max_grad_norm * strategy.scale)
    count = rows.shape[1]
    error = np.sqrt((1 + np.eye(n)) / count)
    return float((np.abs(white @ white.T / count - np.eye(n)) / error).max())


@both
def test_noise_and_draws_of_a_training_that_is_resumed_twice(changes: dict[str, Any], tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    rows, drawn = [], []
    for number, steps in enumerate((3, 1, None)):
        training, noise, batches = train(ledger, changes, steps, continue_ledger=number > 0)
        rows.append(noise)
        drawn += batches
        report = training.run.report()
        if number == 2:
            path = tmp_path / "state"
            training.accelerator.save_state(str(path))
            check_no_secret(path, tmp_path / "_ledger.noise")
        training.close()
    released = np.concatenate(rows)
    assert released.shape == (STEPS, len(values(training.model)))
    assert whiteness(released, training) < SIGMAS
    assert whiteness(np.concatenate([released[:4], released[5:], released[4:5]]), training) > 10  # it sees an order

    apart = training.run.schedule.strategy.min_separation  # type: ignore[union-attr]  # there is one
    places = [{step % apart for step, batch in enumerate(drawn) if index in batch} for index in range(EXAMPLES)]
    assert max(map(len, places)) == 1

    assert report["private"] and report["steps_released"] == STEPS
    assert report["epsilon_spent"] == report["epsilon_planned"] == training.run.schedule.epsilon
    assert training.run.epsilon(exact=True) == pytest.approx(report["epsilon_spent"])
    content = Ledger.read(ledger)
    assert [count for _, count in content.events] == [3, 1, 4]
    with pytest.raises(dpft.BudgetExceededError):
        train(ledger, changes, continue_ledger=True)


def check_no_secret(checkpoint: Path, secrets: Path) -> None:
    found = [json.loads(line)["secret"] for line in secrets.read_text().splitlines()[1:]]
    assert len(found) == 3 and len(set(found)) == 3
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content or bytes.fromhex(secret) in content for secret in found)


def test_sums_in_host_memory(tmp_path: Path) -> None:
    dataset = Seen()
    training = Training(
        tmp_path / "ledger", dataset=dataset, changes=BANDMF, test_seed=None, sums_device="cpu", make=adamless
    )
    rows: list[np.ndarray] = []
    before = values(training.model)
    for _ in training.physical():
        if training.loader.is_last:
            after = values(training.model)  # SGD with a rate of 1: the difference is the release
            rows.append(((before - after) * 2).numpy())
            before = after
    assert whiteness(np.array(rows), training) < SIGMAS + 4  # rounded by the parameters


def adamless(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


@both
def test_a_resume_without_the_secrets_ends(changes: dict[str, Any], tmp_path: Path) -> None:
    training, _, _ = train(tmp_path / "ledger", changes, 2)
    training.close()
    secrets = tmp_path / "_ledger.noise"
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert fnmatch.fnmatch(secrets.name, "_*")  # which transformers' Trainer does not upload
    secrets.rename(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="without it, begin a new run"):
        train(tmp_path / "ledger", changes, continue_ledger=True)
    (tmp_path / "elsewhere").rename(secrets)
    train(tmp_path / "ledger", changes, 1, continue_ledger=True)[0].close()  # the ledger was closed, and nothing lost
    with pytest.raises(LedgerError, match="another mechanism"):  # a plan that was extended
        train(tmp_path / "ledger", {**changes, "num_steps": STEPS + 1}, continue_ledger=True)


def test_a_resume_of_another_model_ends(tmp_path: Path) -> None:
    train(tmp_path / "ledger", BANDMF, 2)[0].close()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(LedgerError, match="the digest of the trained parameters"):
        Training(
            tmp_path / "ledger", model=model, dataset=Seen(), changes=BANDMF, test_seed=None, continue_ledger=True
        )


def test_a_resume_with_the_sums_elsewhere_ends(tmp_path: Path) -> None:
    """Parameters would get noise in the order of the model, not of the optimiser."""
    train(tmp_path / "ledger", BANDMF, 2)[0].close()
    with pytest.raises(LedgerError, match="the engine was 'single' when the run began and is 'single cpu'"):
        train(tmp_path / "ledger", BANDMF, 1, continue_ledger=True, sums_device="cpu", make=adamless)


@both
def test_a_resume_with_the_examples_in_another_order_ends(changes: dict[str, Any], tmp_path: Path) -> None:
    """An example would be in steps that are nearer to each other than the accounting assumes."""
    train(tmp_path / "ledger", changes, 2)[0].close()
    for reorder in (lambda items: items[::-1], lambda items: [*items[1:], items[0]]):
        dataset = Seen()
        dataset.items = reorder(dataset.items)
        with pytest.raises(LedgerError, match=r"the order of the examples \(a digest of some\) was"):
            Training(
                tmp_path / "ledger", dataset=dataset, changes=changes, test_seed=None, continue_ledger=True
            ).close()


def test_a_resume_with_twice_the_examples_at_the_same_rate_ends(tmp_path: Path) -> None:
    """Sample rate and strategy are as before, and yet most examples would change to another group."""
    train(tmp_path / "ledger", BANDMF, 2)[0].close()
    dataset = Seen()
    dataset.items += dataset.items
    changes = {**BANDMF, "expected_batch_size": 4}
    before, now = config(**BANDMF).resolve(EXAMPLES), config(**changes).resolve(2 * EXAMPLES)
    assert before.mechanism == now.mechanism
    with pytest.raises(LedgerError, match="the number of examples was '12' when the run began and is '24'"):
        Training(tmp_path / "ledger", dataset=dataset, changes=changes, test_seed=None, continue_ledger=True).close()


def test_without_correlated_noise_there_is_no_file(tmp_path: Path) -> None:
    train(tmp_path / "ledger", {"num_steps": 1, "expected_batch_size": 2})[0].close()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]


def test_a_parameter_that_is_frozen_midway_ends_the_run(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger", dataset=Seen(), changes=BANDMF, test_seed=None)
    before = None
    with pytest.raises((dpft.DPFTError, ValueError)):
        for _ in training.physical():
            if training.loader.is_last:
                before = values(training.model)
                next(training.model.parameters()).requires_grad_(False)
    assert before is not None and values(training.model).equal(before)


@both
def test_an_interrupt_between_the_line_and_the_noise_ends_the_run(changes: dict[str, Any], tmp_path: Path) -> None:
    """A next loop would begin a step behind: its examples would be in rows that are nearer to each other than b."""
    training = Training(tmp_path / "ledger", dataset=Seen(), changes=changes, test_seed=None)
    private = training.optimizer.optimizer
    record = private._on_release

    def interrupted() -> None:
        record()
        if training.run.steps == 3:
            raise KeyboardInterrupt

    private._on_release = interrupted
    with pytest.raises(KeyboardInterrupt):
        training.train()
    before = values(training.model)
    with pytest.raises(dpft.WrapError, match="counts 4 releases, and the noise to come is that of release 3"):
        training.train()
    assert values(training.model).equal(before)
    training.close()
    train(tmp_path / "ledger", changes, continue_ledger=True)[0].close()  # where the noise of release 5 is next


# ------------------------------------------------------------------------------------------------------ SIGKILL
def live(folder: Path, changes: dict[str, Any]) -> None:
    """One life of a run that is killed: what is released is written at the last instant before it is."""
    ledger = folder / "ledger"
    began = ledger.exists() and ledger.stat().st_size > 0 and Ledger.read(ledger).count > 0
    training = Training(ledger, dataset=Seen(), changes=changes, test_seed=None, continue_ledger=began)
    step = training.inner.step

    def spied(*args: Any) -> None:
        number = training.run.steps - 1
        parts = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
        np.save(folder / f"{number}.part.npy", torch.cat(parts).double().numpy() * changes["expected_batch_size"])
        (folder / f"{number}.part.npy").rename(folder / f"{number}.npy")
        step(*args)

    training.inner.step = spied  # type: ignore[method-assign]  # a spy takes its place
    training.train()


def lives(folder: Path, changes: dict[str, Any], kills: int) -> None:
    """Lives of one run, forked from this process, which has imported everything: killed, and at last to its end."""
    config(**changes).resolve(EXAMPLES).meter().at(1)
    rng = random.Random(7)
    for number in range(kills + 1):
        wanted = len(list(folder.glob("*.npy"))) + rng.randrange(1, 6)
        child = os.fork()
        if child == 0:
            try:
                live(folder, changes)
                os._exit(0)
            finally:
                os._exit(1)
        if number < kills:
            while len(list(folder.glob("*.npy"))) < wanted and not os.waitid(os.P_PID, child, EXITED):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-signal.SIGKILL if number < kills else 0), (number, status)


EXITED = os.WEXITED | os.WNOHANG | os.WNOWAIT


@pytest.mark.slow
@both
def test_noise_of_a_run_that_is_killed_again_and_again(changes: dict[str, Any], tmp_path: Path) -> None:
    """Killed with SIGKILL at random instants: each release has its own noise, with the law over all of them."""
    changes, kills = {**changes, "num_steps": 40}, 6  # at most 6 releases in each life that is killed
    words = [sys.executable, "-m", "tests.test_prepare_correlated", str(tmp_path), json.dumps(changes), str(kills)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    content = Ledger.read(tmp_path / "ledger")
    assert content.count == 40 and len(content.events) == kills + 1
    schedule = config(**changes).resolve(EXAMPLES)
    strategy = schedule.strategy
    assert strategy is not None
    # A release that is in the ledger, and was never made, is missing: the others keep their law.
    made = [number for number in range(40) if (tmp_path / f"{number}.npy").exists()]
    assert len(made) >= 40 - kills
    rows = np.stack([np.load(tmp_path / f"{number}.npy") for number in made])
    c = strategy.coefficients()
    inverse = np.linalg.inv([[c[i - j] if i >= j else 0.0 for j in range(40)] for i in range(40)]) * strategy.scale
    expected = (inverse @ inverse.T)[np.ix_(made, made)]
    found = rows @ rows.T / rows.shape[1]
    diagonal = np.diag(expected)
    error = np.sqrt((expected**2 + np.outer(diagonal, diagonal)) / rows.shape[1])
    assert (np.abs(found - expected) / error).max() < SIGMAS


if __name__ == "__main__":
    torch.set_num_threads(1)
    lives(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
