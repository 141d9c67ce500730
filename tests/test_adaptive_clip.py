"""A clip norm that adapts: sum and count are one Gaussian mechanism, the ledger has every C, and a resume goes on."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import dpft
from dpft.errors import LedgerError, PrivacyConfigError
from dpft.privacy import Ledger, PrivacySchedule
from tests import oracle, zoo
from tests.oracle import Batch
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


# --- the budget: what the sum gets, so that both together have the run's noise multiplier


def test_golden_values() -> None:
    """Andrew et al. 2021, Theorem 1; z = 1 with a deviation of 5 is 1 / sqrt(0.99)."""
    clip = dpft.AdaptiveClip(count_noise=5.0)
    assert clip.sum_noise_multiplier(1.0, 100) == pytest.approx(1.005037815259212, rel=1e-14)
    assert dpft.AdaptiveClip(count_noise=1.0).sum_noise_multiplier(1.2, 100) == pytest.approx(1.5, rel=1e-14)
    assert dpft.AdaptiveClip().count_std(1.0, 2000) == 100.0  # m / 20, as in the paper
    assert dpft.AdaptiveClip().count_std(2.0, 20) == 10.0


@hypothesis.given(
    z=st.floats(0.05, 100), batch=st.floats(1, 1e6), count=st.none() | st.floats(1e-3, 1e3), more=st.floats(1.01, 10)
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=200)
def test_limits(z: float, batch: float, count: float | None, more: float) -> None:
    """Never less noise on the sum than without a count; the more on the count, the less on the sum, down to z."""
    clip = dpft.AdaptiveClip(count_noise=count)
    std = clip.count_std(z, batch)
    if z >= 2 * std:
        with pytest.raises(PrivacyConfigError, match="would spend the budget"):
            clip.sum_noise_multiplier(z, batch)
        return
    of_sum = clip.sum_noise_multiplier(z, batch)
    assert of_sum >= z and of_sum >= dpft.AdaptiveClip(count_noise=more * std).sum_noise_multiplier(z, batch)
    if count is None:
        assert of_sum <= 1.0051 * z
    assert clip.sum_noise_multiplier(0.0, batch) == 0.0


def test_the_update_finds_the_quantile_and_stays_finite() -> None:
    norms = torch.linspace(0.1, 10, 1000)
    clip, current = dpft.AdaptiveClip(quantile=0.8), 0.01
    for _ in range(300):
        below = (norms <= current).sum().item()
        current = clip.next_clip_norm(current, below - 500, 1000)
    assert current == pytest.approx(float(norms.quantile(0.8)), rel=0.01)
    for count in (1e12, -1e12):
        assert 0 < clip.next_clip_norm(current, count, 1) < math.inf


def test_epsilon_is_that_of_the_run_without_it() -> None:
    plain, adaptive = (config(num_steps=50, adaptive_clip=c).resolve(60) for c in (None, dpft.AdaptiveClip()))
    assert plain.epsilon == adaptive.epsilon and plain.mechanism == adaptive.mechanism
    assert adaptive.sum_noise_multiplier > adaptive.noise_multiplier == plain.sum_noise_multiplier
    assert plain.count_noise is None and adaptive.count_noise == 5.0


# --- the sensitivity: neighbouring datasets, whatever the example


class Votes(nn.Module):
    """Its gradient is what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def joint(batch: Batch, strategy: Any, schedule: PrivacySchedule) -> Tensor:
    """Sum and count of a batch, float64, in units of their noise: what the Gaussian mechanism gets."""
    from dpft.clipping.factors import ClipCount
    from dpft.wrap import get_state

    assert schedule.count_noise is not None
    model = dpft.wrap(zoo.seeded(lambda a: Votes())(), strategy=strategy, max_grad_norm=schedule.max_grad_norm)
    state = get_state(model)
    state.count = ClipCount()
    if strategy == "per_example":
        losses: Any = [(model(x[None]).sum() * s) for x, s in zip(batch["x"], batch["scale"], strict=True)]
    else:
        losses = model(batch["x"]).sum(1) * batch["scale"]
    dpft.clipped_loss(model, losses, batch.get("example_weight")).backward()
    total = torch.cat([g.double().flatten() for g in oracle.grads_of(model).values()])
    count = torch.tensor([state.count.take() / 2], dtype=torch.float64)
    return torch.cat([total / (schedule.sum_noise_multiplier * schedule.max_grad_norm), count / schedule.count_noise])


magnitude = st.sampled_from([0.0, 1e-30, 1e-3, 0.1, 1.0, 1e4, 1e19, 3e38, float("inf"), float("nan")])


@hypothesis.given(
    strategy=st.sampled_from(["one_pass", "two_pass", "per_example"]),
    z=st.sampled_from([0.3, 1.0, 4.0]),
    share=st.sampled_from([0.51, 0.7, 5.0]),
    others=st.integers(1, 4),
    inputs=magnitude,
    scale=magnitude,
    seed=st.integers(0, 3),
)
@hypothesis.settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_one_example_moves_sum_and_count_by_at_most_one_over_z(
    strategy: str, z: float, share: float, others: int, inputs: float, scale: float, seed: int
) -> None:
    schedule = config(
        noise_multiplier=z, max_grad_norm=0.5, adaptive_clip=dpft.AdaptiveClip(count_noise=share * z)
    ).resolve(12)
    g = torch.Generator().manual_seed(seed)
    batch = {"x": torch.randn(others + 1, 4, generator=g), "scale": torch.ones(others + 1)}
    batch["x"][-1] *= inputs
    batch["scale"][-1] = scale
    with_it = joint(batch, strategy, schedule)
    without = joint(oracle.rows(batch, range(others)), strategy, schedule)
    distance = float((with_it - without).norm())
    assert distance <= (1 + 1e-6) / z
    moved = abs(float(with_it[-1] - without[-1])) * share * z
    assert moved == pytest.approx(0.5)  # a vote each, also of what is not finite
    if scale == 1e4 and inputs == 1.0:
        assert distance >= (1 - 1e-6) / z  # the bound is reached: no noise is wasted
    # One example that replaces another: both vectors are bounded.
    other = oracle.rows(batch, [*range(others), 0])
    assert float((joint(other, strategy, schedule) - with_it).norm()) <= 2 * (1 + 1e-6) / z


def test_padding_rows_do_not_vote() -> None:
    schedule = config(adaptive_clip=dpft.AdaptiveClip()).resolve(12)
    batch = {"x": torch.ones(4, 4), "scale": torch.full((4,), 1e-3)}
    weights = {"example_weight": torch.tensor([1.0, 0.0, float("nan"), 1.0])}
    for strategy in ("one_pass", "two_pass", "per_example"):
        assert float(joint({**batch, **weights}, strategy, schedule)[-1]) * 5.0 == 1.0  # two of four


# --- the law of the noise


class Silent(nn.Module):
    """Its weight's gradient is exactly zero, as the input is; its bias's is far above any clip norm here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_noise_of_sum_and_count(path: Path) -> None:
    """The weight's steps are noise of deviation z_sum C_t / b, each with its own C; the counts' is in the Cs."""
    steps, b, clip = 150, 6, dpft.AdaptiveClip(count_noise=0.6, learning_rate=0.1)
    data = [{"x": torch.zeros(100)} for _ in range(12)]
    changes = {"sample_rate": 1.0, "num_steps": steps, "adaptive_clip": clip, "max_grad_norm": 1e-3}
    training = Training(path, model=Silent(), dataset=data, changes=changes, max_physical_batch_size=5)
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
        with pytest.raises(LedgerError, match="the clip norm"):
            training.run.load_state_dict(wrong)
    assert "clip_norm" not in Training(path.with_name("plain")).train(1).run.state_dict()


def test_a_torn_line_counts_and_its_norm_is_the_one_before(path: Path) -> None:
    """Whatever part of the line of release 3 reached the disk: the release counts, its noised count is not used."""
    training = Training(path, changes=ADAPTIVE).train(3)
    training.close()
    whole, last = path.read_bytes(), len(path.read_bytes().splitlines(keepends=True)[-1])
    norms = norms_of(path, 1.0)
    for cut in range(1, last, 7):
        path.write_bytes(whole[: len(whole) - cut])
        content = Ledger.read(path)
        assert content.count == 3
        assert content.clip_norm_after(3) == (norms[3] if cut == 1 else norms[2])
    with Ledger.open(path, "resume", mechanism=config().resolve(12).mechanism) as ledger:
        assert ledger.clip_norm_after(3) == norms[2]
    assert Ledger.read(path).clip_norm_after(3) == norms[2]


def test_a_norm_that_is_none_is_damage(path: Path) -> None:
    from dpft.privacy.ledger_file import encode

    with Ledger.open(path, "new", mechanism=config().resolve(12).mechanism) as ledger:
        ledger.record(0.5)
    with open(path, "ab") as file:
        file.write(encode({"release": 2, "segment": 0, "next_clip_norm": -1.0}))
    with pytest.raises(LedgerError, match=r"has the clip norm -1\.0"):
        Ledger.read(path)


def test_only_the_same_adaptation_goes_on(path: Path) -> None:
    Training(path, changes=ADAPTIVE).train(1).close()
    for other in (None, dpft.AdaptiveClip(quantile=0.9)):
        with pytest.raises(LedgerError, match="was written with adaptive_clip="):
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


# --- configuration, statement


def test_statement_and_schedule() -> None:
    schedule = config(adaptive_clip=dpft.AdaptiveClip(quantile=0.7), sample_rate=0.1, num_steps=9).resolve(60)
    assert PrivacySchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert "0.7-quantile" in schedule.describe() and "1.00504" in schedule.describe()
    report = dpft.privacy_report(schedule, 9, clipping="flash")
    text = dpft.privacy_statement_markdown(json.loads(json.dumps(report, allow_nan=False)))
    for piece in ("arXiv 1905.03871, Theorem 1", "1 at first", "1.00504 on the sum", "deviation 5 on the count"):
        assert piece in text
    assert "the clip norms are public" in text
    plain = dpft.privacy_statement_markdown(dpft.privacy_report(config().resolve(60), 3))
    assert "quantile" not in plain and "at first" not in plain


def test_configuration_goes_to_a_file_and_back() -> None:
    adaptive = config(adaptive_clip=dpft.AdaptiveClip(count_noise=7))
    again = dpft.PrivacyConfig.from_dict(json.loads(json.dumps(adaptive.to_dict())))
    assert again == adaptive and again.fingerprint() == adaptive.fingerprint() != config().fingerprint()
    assert "adaptive_clip" not in config().to_dict()
    with pytest.raises(PrivacyConfigError, match="not an AdaptiveClip"):
        dpft.PrivacyConfig.from_dict({**adaptive.to_dict(), "adaptive_clip": {"quantil": 0.5}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "user", "examples_per_user": 2}, "its count is accounted for"),
        ({"sampler": "shuffle"}, "its count is accounted for"),
        ({"clip_function": "automatic"}, "its count is accounted for"),
        ({"adaptive_clip": 0.5}, "expected a dpft.AdaptiveClip"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyConfigError, match=message):
        config(**{"adaptive_clip": dpft.AdaptiveClip(), **changes})


@pytest.mark.parametrize("bad", [{"quantile": 1.0}, {"quantile": 0}, {"learning_rate": math.nan}, {"count_noise": -1}])
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(PrivacyConfigError, match="AdaptiveClip: "):
        dpft.AdaptiveClip(**bad)


def test_too_little_noise_on_the_count_is_refused_before_training() -> None:
    with pytest.raises(PrivacyConfigError, match="would spend the budget"):
        config(adaptive_clip=dpft.AdaptiveClip(count_noise=0.5)).resolve(12)


@pytest.mark.parametrize("sampler", ["truncated_poisson", "fixed_size"])
def test_other_samplers_train(path: Path, sampler: str) -> None:
    """Their theorems ask for bounded vectors too: replacing one moves sum and count by 2 / z (tested above)."""
    more = {"max_batch_size": 8} if sampler == "truncated_poisson" else {"accountant": "rdp"}
    training = Training(path, changes={**ADAPTIVE, "sampler": sampler, **more}).train()
    assert len(norms_of(path, 1.0)) == 7 and training.run.steps == 6


def test_without_clipping_there_is_nothing_to_count(path: Path) -> None:
    with pytest.raises(PrivacyConfigError, match="clipped examples are counted where each is"):
        Training(path, changes={**ADAPTIVE, "noise_multiplier": 0}, clipping="none")
