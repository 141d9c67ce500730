"""A clip norm that adapts: sum and count are one Gaussian mechanism, the ledger has every C, and a resume goes on."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from tests import oracle
from tests.training import Training, collate, config, examples, tiny_llama, values

SIGMAS = 5.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if '"release"' in line]


def norms_of(path: Path, first: float) -> list[float]:
    """C of each release, and of the one that would follow."""
    return [first, *(line["next_clip_norm"] for line in lines(path))]


def test_epsilon_is_that_of_the_run_without_it() -> None:
    plain, adaptive = (config(num_steps=50, adaptive_clip=c).resolve(60) for c in (None, dpft.AdaptiveClip()))
    assert plain.epsilon == adaptive.epsilon and plain.mechanism == adaptive.mechanism
    assert adaptive.sum_noise_multiplier > adaptive.noise_multiplier == plain.sum_noise_multiplier
    assert plain.count_noise is None and adaptive.count_noise == 5.0


# --- the law of the noise


class Silent(nn.Module):
    """Its weight's gradient is exactly zero, as the input is; its bias's is far above any clip norm here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("seed", [3, None], ids=["seeded", "from the operating system"])
def test_noise_of_sum_and_count(path: Path, seed: int | None) -> None:
    """The weight's steps are noise of deviation z_sum C_t / b, each with its own C; the counts' is in the Cs."""
    steps, b, clip = 100, 6, dpft.AdaptiveClip(count_noise=0.6, learning_rate=0.1)
    data = [{"x": torch.zeros(100)} for _ in range(12)]
    changes = {"sample_rate": 1.0, "num_steps": steps, "adaptive_clip": clip, "max_grad_norm": 1e-3}
    options: dict[str, Any] = {"changes": changes, "max_physical_batch_size": 5, "test_seed": seed}
    training = Training(path, model=Silent(), dataset=data, **options)
    weight, moves = training.model.layer.weight, []
    before = weight.detach().clone()
    for batch in training.loader:
        losses = training.model(batch["x"]).sum(1) * 1e6
        training.accelerator.backward(dpft.clipped_loss(training.model, losses, batch["example_weight"]))
        training.optimizer.step()
        training.optimizer.zero_grad()
        if training.loader.is_last:
            moves.append((weight.detach() - before).double().flatten())
            before = weight.detach().clone()
    norms = norms_of(path, 1e-3)
    assert len(norms) == steps + 1 and training.run.clip_norm == norms[-1]
    z_sum = 1 / math.sqrt(1 - 1 / 1.44)
    scaled = torch.stack([move * b / norm for move, norm in zip(moves, norms, strict=False)])
    assert abs(scaled.std() / z_sum - 1) < SIGMAS / math.sqrt(2 * scaled.numel())
    of_each = scaled.std(1) / z_sum  # no release with another one's C
    assert (of_each - 1).abs().max() < SIGMAS * 1.2 / math.sqrt(2 * scaled.shape[1])
    # All twelve are clipped: the count is -6, plus noise.
    counts = torch.tensor([b * (-math.log(c2 / c1) / 0.1) for c1, c2 in itertools.pairwise(norms)])
    assert abs(counts.mean() + 6) < SIGMAS * 0.6 / math.sqrt(steps)
    assert abs(counts.std() / 0.6 - 1) < SIGMAS / math.sqrt(2 * steps)
    together = torch.stack([counts - counts.mean(), scaled.mean(1)])
    assert abs(torch.corrcoef(together)[0, 1]) < SIGMAS / math.sqrt(steps)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass", "per_example"])
def test_the_sum_is_clipped_to_each_release_s_own_norm(path: Path, strategy: Any) -> None:
    """Without noise on the sum and next to none on the count, against the oracle in float64."""
    clip = dpft.AdaptiveClip(count_noise=1e-9, learning_rate=1.0, quantile=0.6)
    options = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 3, "adaptive_clip": clip, "max_grad_norm": 0.2}
    training = Training(path, changes=options, strategy=strategy, max_physical_batch_size=5)
    model, current = tiny_llama().double(), 0.2
    for _ in range(3):
        exact = oracle.oracle(model, collate(examples()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), exact.clipped_sum(current).values(), strict=True):
                p -= g / 6
        below = int((exact.norms <= current).sum())
        training.train(1)
        current *= math.exp(-(0.5 + (below - 6) / 6 - 0.6))
        assert training.run.clip_norm == pytest.approx(current, rel=1e-6)
        assert (values(training.model) - values(model)).norm() < 1e-5 * values(model).norm()
    assert len({line["next_clip_norm"] for line in lines(path)}) > 1


# --- ledger and resume


ADAPTIVE = {"adaptive_clip": dpft.AdaptiveClip(), "num_steps": 6}


def test_a_resume_goes_on_with_the_ledger_s_norm(path: Path, tmp_path: Path) -> None:
    training = Training(path, changes=ADAPTIVE).train(2)
    training.accelerator.save_state(str(tmp_path / "state"))
    training.train(2)  # released after the checkpoint, and counted
    training.close()
    resumed = Training(path, changes=ADAPTIVE)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    norms = norms_of(path, 1.0)
    assert len(norms) == 5 and resumed.run.clip_norm == norms[-1] != norms[2]
    resumed.train()
    assert len(norms_of(path, 1.0)) == 7 and resumed.run.clip_norm == norms_of(path, 1.0)[-1]


def test_checkpoint_and_ledger_must_agree(path: Path) -> None:
    training = Training(path, changes=ADAPTIVE).train(2)
    state = training.run.state_dict()
    assert state["clip_norm"] == norms_of(path, 1.0)[-1]
    training.run.load_state_dict(state)
    for wrong in ({**state, "clip_norm": 0.123}, {name: state[name] for name in ("run_id", "count")}):
        with pytest.raises(dpft.LedgerError, match="the clip norm"):
            training.run.load_state_dict(wrong)
    assert "clip_norm" not in Training(path.with_name("plain")).train(1).run.state_dict()


def test_only_the_same_adaptation_goes_on(path: Path) -> None:
    Training(path, changes=ADAPTIVE).train(1).close()
    for other in (None, dpft.AdaptiveClip(quantile=0.9)):
        with pytest.raises(dpft.LedgerError, match="was written with adaptive_clip="):
            Training(path, changes={**ADAPTIVE, "adaptive_clip": other})


def test_an_abandoned_logical_batch_does_not_vote(path: Path) -> None:
    """Its examples are not in the sum, and so not in the count."""
    clip = dpft.AdaptiveClip(count_noise=1e-9, learning_rate=1.0)
    options = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 1, "adaptive_clip": clip, "max_grad_norm": 1e3}
    training = Training(path, changes=options)
    for batch in training.loader:
        training.backward(batch)
        break
    training.train()
    assert training.run.clip_norm == pytest.approx(1e3 * math.exp(-(0.5 + 6 / 6 - 0.5)), rel=1e-6)


CHILD = """
import os, sys
from pathlib import Path
import dpft
from tests.training import Training
folder = Path(sys.argv[1])
options = {"adaptive_clip": dpft.AdaptiveClip(), "num_steps": 300}
training = Training(folder / "ledger", changes=options, test_seed=None)
if (folder / "state").exists():
    training.accelerator.load_state(str(folder / "state"))
side = open(folder / "side", "a")
for _ in training.physical():
    if training.loader.is_last:  # released: with this C, and this one is next
        used = training.optimizer.optimizer.max_grad_norm
        print(training.run.steps, used, training.run.clip_norm, file=side, flush=True)
    if training.run.steps == 3:
        training.accelerator.save_state(str(folder / "state"))
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Each release is made with the C of the line before, over two kills; the checkpoint is far behind the ledger."""
    side, ledger = tmp_path / "side", tmp_path / "ledger"
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    root = Path(__file__).resolve().parents[1]
    words = [sys.executable, str(script), str(tmp_path)]
    for more in (12, 12):
        known = len(lines(ledger)) if ledger.exists() else 0
        with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(root)}) as child:
            while not ledger.exists() or ledger.read_bytes().count(b'"release"') < known + more:
                assert child.poll() is None
                time.sleep(0.01)
            child.kill()
        assert child.returncode == -signal.SIGKILL
    content = [
        line for line in ledger.read_bytes().split(b"\n") if b'"next_clip_norm"' in line and line.endswith(b"}")
    ]
    written = [1.0, *(json.loads(line)["next_clip_norm"] for line in content)]
    made = [line.split() for line in side.read_text().splitlines()]
    assert len(made) >= 20 and len(written) - 1 >= len(made)
    if sum(b'"torn"' in line for line in ledger.read_bytes().split(b"\n")) == 0:
        for number, used, following in made:
            assert (float(used), float(following)) == (written[int(number) - 1], written[int(number)])


# --- configuration, statement


def test_statement_and_schedule() -> None:
    schedule = config(adaptive_clip=dpft.AdaptiveClip(quantile=0.7), sample_rate=0.1, num_steps=9).resolve(60)
    assert dpft.PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert "0.7-quantile" in schedule.describe() and "1.00504" in schedule.describe()
    report = dpft.privacy_report(schedule, 9, clipping="flash")
    text = dpft.privacy_statement_markdown(json.loads(json.dumps(report, allow_nan=False)))
    for piece in ("arXiv 1905.03871, Theorem 1", "1 at first", "1.00504 on the sum", "deviation 5 on the count"):
        assert piece in text
    assert "the clip norms are public" in text
    plain = dpft.privacy_statement_markdown(dpft.privacy_report(config().resolve(60), 3))
    assert "quantile" not in plain and "at first" not in plain


@pytest.mark.parametrize("sampler", [pytest.param("truncated_poisson", marks=pytest.mark.slow), "fixed_size"])
def test_other_samplers_train(path: Path, sampler: str) -> None:
    """Their theorems ask for bounded vectors too: replacing one moves sum and count by 2 / z (tested above)."""
    more = {"max_batch_size": 8} if sampler == "truncated_poisson" else {"accountant": "rdp"}
    training = Training(path, changes={**ADAPTIVE, "sampler": sampler, **more}).train()
    assert len(norms_of(path, 1.0)) == 7 and training.run.steps == 6


def test_without_clipping_there_is_nothing_to_count(path: Path) -> None:
    with pytest.raises(dpft.PrivacyConfigError, match="clipped examples are counted where each is"):
        Training(path, changes={**ADAPTIVE, "noise_multiplier": 0}, clipping="none")
