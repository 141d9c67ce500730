"""Every mechanism, killed with SIGKILL at exact instants of a release and resumed: nothing spent is forgotten.

Each run is killed four times: before a release's line is in the ledger, after it, with the noise drawn for some of
the parameters, and after the step. Then it goes on to its end. All labels are -100, so every example's gradient is
zero and what is released *is* the noise. Random instants: ``test_resume.py``, ``test_prepare_correlated.py``; several
ranks: ``tests/engines/test_kills.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import dpft
from dpft.correlated_noise import CorrelatedNoise
from dpft.privacy import Ledger
from dpft.privacy.correlated.noise_secrets import NoiseSecret
from tests.training import EXAMPLES, Training, config, examples, tiny_llama

STEPS, KILLED = 10, 7  # the releases of all, and of the lives that are killed
INSTANTS = ("before", "recorded", "drawing", "stepped")
MECHANISMS: dict[str, dict[str, Any]] = {
    "dp_sgd": {},
    "secure": {"secure_rng": True},
    "bandmf": {"mechanism": "bandmf", "bands": 3, "sampler": "cyclic_poisson", "expected_batch_size": 2},
    "blt": {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order", "expected_batch_size": 3},
    "balls_and_bins": {
        "sampler": "balls_and_bins",
        "expected_batch_size": 3,
        "num_steps": 40,
    },  # a start costs an epoch
    "adaptive clip": {"adaptive_clip": dpft.AdaptiveClip()},
    "clip groups": {"clip_groups": "layer"},
    "users": {"expected_batch_size": 3},
    "account": {},
}
CORRELATED = ("bandmf", "blt")


def changes_of(name: str) -> dict[str, Any]:
    return {"num_steps": STEPS, **MECHANISMS[name]}


def examples_of(name: str) -> int:
    return EXAMPLES // 2 if name == "users" else EXAMPLES


def begin(folder: Path, name: str) -> Training:
    """The run, from its last checkpoint, if it has one."""
    rows = [{**example, "labels": torch.full_like(example["labels"], -100)} for example in examples()]
    dataset: Any = dpft.by_user(rows, [i // 2 for i in range(len(rows))], rows=1) if name == "users" else rows
    account = folder / "account.jsonl" if name == "account" else None
    training = Training(folder / "ledger", dataset=dataset, changes=changes_of(name), test_seed=None, account=account)
    if (folder / "state").exists():
        training.accelerator.load_state(str(folder / "state"))
    return training


def live(folder: Path, name: str, instant: str | None) -> None:
    """One life of a run: two releases and a checkpoint after the first, killed in the second; or to the end."""
    training = begin(folder, name)
    run, noise = training.run, training.optimizer.optimizer.noise
    record, add, step = run.ledger.record, noise.add_, training.inner.step
    began, drawn = run.steps, 0
    with (folder / "side").open("a") as side:

        def tell(**fields: Any) -> None:
            print(json.dumps(fields), file=side, flush=True)

        def die_at(place: str) -> None:
            if place == instant and run.steps - began == (1 if place == "before" else 2):
                os.kill(os.getpid(), signal.SIGKILL)

        def recorded(*args: Any) -> int:
            nonlocal drawn
            die_at("before")
            count = record(*args)
            drawn = 0
            tell(line=count, epsilon=run.epsilon(exact=count <= KILLED))  # the other is an upper bound
            die_at("recorded")
            return count

        def added(tensor: torch.Tensor, std: float, *place: Any) -> torch.Tensor:
            nonlocal drawn
            before = tensor.clone()
            out = add(tensor, std, *place)
            drawn += 1
            if tensor.numel() >= 16:
                tell(drawn=(out - before).flatten()[:16].tolist())
            if drawn == 3:
                die_at("drawing")
            return out

        def stepped(*args: Any) -> None:
            flat = torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None])
            torch.save(flat, folder / f"release-{run.steps}.pt")
            step(*args)
            die_at("stepped")

        run.ledger.record = recorded  # type: ignore[assignment]  # a spy takes its place
        noise.add_ = added
        training.inner.step = stepped  # type: ignore[method-assign]  # a spy takes its place
        tell(start=run.steps, epsilon=run.epsilon(exact=True))
        for _ in training.physical():
            if training.loader.is_last and run.steps == began + 1 and instant is not None:
                training.accelerator.save_state(str(folder / "state"))
        report = run.report()
        tell(end=run.steps, epsilon=report["epsilon_spent"], planned=report["epsilon_planned"])
    run.close()


def lives(folder: Path) -> None:
    """All runs, forked from this process, which has imported everything."""
    with tempfile.TemporaryDirectory() as once:
        training = begin(Path(once), "dp_sgd").train(1)
        training.accelerator.save_state(once)
    for name in MECHANISMS:
        own = folder / name
        own.mkdir()
        if name == "account":
            dpft.Account.create(own / "account.jsonl", epsilon=200.0, delta=1e-3)
        for instant in (*INSTANTS, None):
            child = os.fork()
            if child == 0:
                try:
                    live(own, name, instant)
                    os._exit(0)
                finally:
                    os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == (0 if instant is None else -signal.SIGKILL), (name, instant, status)


def check_correlated(folder: Path) -> None:
    """Each release has, to the bit, the noise that the file of secrets says, over all starts and lost releases."""
    schedule = config(**changes_of(folder.name)).resolve(EXAMPLES)
    lines = [json.loads(line) for line in (folder / "_ledger.noise").read_text().splitlines()[1:]]
    secrets = [NoiseSecret(line["first"], bytes.fromhex(line["secret"])) for line in lines]
    assert schedule.strategy is not None and len(secrets) == len(INSTANTS) + 1
    for number, secret in enumerate(secrets):
        noise = CorrelatedNoise(schedule.strategy, secrets[: number + 1])
        last = secrets[number + 1].first if number + 1 < len(secrets) else STEPS
        for count in range(secret.first + 1, last + 1):
            with noise.release():
                parts = [
                    noise.add_(torch.zeros(p.shape), schedule.noise_multiplier * schedule.max_grad_norm)
                    for p in tiny_llama().parameters()
                ]
            expected = torch.cat([part.flatten() for part in parts]) / schedule.expected_batch_size
            released = folder / f"release-{count}.pt"
            assert not released.exists() or torch.load(released).equal(expected), count


def check(folder: Path) -> None:
    side = [json.loads(line) for line in (folder / "side").read_text().splitlines()]
    starts = [line for line in side if "start" in line]
    # Two lines a life, and one where it was killed before the second.
    assert [line["start"] for line in starts] == [0, 1, 3, 5, KILLED]
    spent = count = 0.0
    for line in side:
        if "line" in line:
            assert line["line"] == count + 1 and line["epsilon"] >= spent * (1 - 1e-9)
            count, spent = line["line"], line["epsilon"]
        elif "start" in line:
            assert line["start"] == count and line["epsilon"] >= spent, "what was spent is forgotten"
    (end,) = (line for line in side if "end" in line)
    assert end["end"] == count == Ledger.read(folder / "ledger").count and count > KILLED
    assert spent <= end["epsilon"] <= end["planned"] * (1 + 1e-9)
    if folder.name not in CORRELATED:  # of which a shorter run has another strategy
        for line in starts[1:]:
            least = config(**{**changes_of(folder.name), "num_steps": line["start"]}).resolve(examples_of(folder.name))
            assert line["epsilon"] >= least.epsilon * (1 - 1e-9), "less than a run of as many steps"
    # "stepped" and the end write a release whose line is there; "recorded" and "drawing" leave lines without one.
    made = {int(path.stem.split("-")[1]) for path in folder.glob("release-*.pt")}
    assert made == set(range(1, int(count) + 1)) - {3, 5}
    blocks = [tuple(line["drawn"]) for line in side if "drawn" in line]
    assert len(blocks) == len(set(blocks)) > 50, "noise was drawn twice"
    if folder.name in CORRELATED:
        check_correlated(folder)
    if folder.name == "account":
        account = dpft.Account.open(folder / "account.jsonl")
        assert sum(uses for _, uses in account.uses()) == count
        assert not account.entries()[-1].open


@pytest.mark.slow
def test_killed_at_exact_instants_and_resumed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.test_prepare_kills", str(tmp_path)]
    done = subprocess.run(
        words, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in MECHANISMS:
        check(tmp_path / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lives(Path(sys.argv[1]))
