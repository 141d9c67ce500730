"""`dpft.tune`: what the theorems assume is what it does, and a trial cannot release more than was declared."""

from __future__ import annotations

import copy
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

import dpft
import dpft.tuning as module
from dpft.errors import AccountingError, BudgetExceededError, EngineError, LedgerError, PrivacyConfigError
from dpft.privacy import Ledger, Mechanism, Selection, Strategy
from tests.fixed_draws import fixed_draws

STEP = Mechanism(sampler="poisson", noise_multiplier=2.0, sample_rate=0.01)
FIGURE = Mechanism(sampler="poisson", noise_multiplier=20.0, sample_rate=1.0)
TRIAL = [(STEP, 5), (FIGURE, 1)]


def account(path: Path, **changes: Any) -> dpft.Account:
    return dpft.Account.create(path / "account.jsonl", **{"epsilon": 20.0, "delta": 1e-5, **changes})


def train(candidate: float, trial: dpft.Trial) -> tuple[dpft.PrivateMean, str]:
    trial.reserve("run", [(STEP, 5)], "a training")
    (trial.folder / "model").write_text(str(candidate))
    score = dpft.private_mean([candidate] * 50, low=0, high=1, account=trial, noise_multiplier=20.0)
    return score, f"model of {candidate}"


def tune(payer: dpft.Account, folder: Path, **changes: Any) -> dpft.Tuned[float] | None:
    values: dict[str, Any] = {"trial": TRIAL, "trials": 6, "distribution": "negative_binomial", **changes}
    return dpft.tune(
        values.pop("train", train), values.pop("candidates", [0.1, 0.9]), account=payer, folder=folder, **values
    )


# --------------------------------------------------------------------------------------------------- what it does
def test_it_pays_before_the_first_trial_and_keeps_only_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "number_of_trials", lambda *_: 12)
    payer, seen = account(tmp_path), []

    def noted(candidate: float, trial: dpft.Trial) -> Any:
        assert payer.uses() == [(Selection(tuple(TRIAL), 6.0, "negative_binomial", 1.0), 1)]
        score, output = train(candidate, trial)
        seen.append((score.value, candidate))
        return score, output

    best = tune(payer, tmp_path / "trials", train=noted)
    assert best is not None and len(seen) == 12 and len(payer.entries()) == 1
    assert (best.score.value, best.candidate) == max(seen)  # type: ignore[union-attr]  # a private mean
    assert best.output == f"model of {best.candidate}"
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [best.folder.name]
    assert (best.folder / "model").read_text() == str(best.candidate)
    assert "negative_binomial, mean 6" in best.tuning and payer.account_id in best.tuning
    assert "12" not in best.tuning.replace(payer.account_id, "") and "12" not in str(
        payer.statement()["uses"][0]["what"]
    )


def test_candidates_are_drawn_uniformly_with_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "number_of_trials", lambda *_: 300)
    drawn: Counter[str] = Counter()

    def noted(candidate: str, trial: dpft.Trial) -> tuple[float, None]:
        drawn[candidate] += 1
        return 1.0, None

    with fixed_draws(0):
        best = dpft.tune(
            noted,
            ["a", "b", "c"],
            account=account(tmp_path),
            trial=TRIAL,
            trials=6,
            scores="public",
            folder=tmp_path / "t",
        )
    assert best is not None and best.output is None
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-4 and len(drawn) == 3


def test_no_trial_is_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "number_of_trials", lambda *_: 0)
    payer = account(tmp_path)
    assert tune(payer, tmp_path / "t", distribution="poisson") is None and len(payer.entries()) == 1


@pytest.mark.parametrize(
    ("shape", "mean"), [(0.0, 5.0), (1e-9, 9.0), (0.5, 5.0), (1.0, 3.0), (2.0, 8.0), (2.5, 2.0), (1.0, 1.0)]
)
def test_number_of_trials_is_definition_1(shape: float, mean: float) -> None:
    with fixed_draws(0):
        drawn = [module.number_of_trials(mean, "negative_binomial", shape) for _ in range(4000)]
    assert min(drawn) == 1
    if mean == 1:
        assert max(drawn) == 1
        return
    gamma = module._gamma(mean, shape)
    k = np.arange(1, 2000)
    weight = 1 / k if shape == 0 else np.exp(special.gammaln(k + shape) - special.gammaln(k + 1))
    law = (1 - gamma) ** k * weight
    law /= law.sum()
    assert law @ k == pytest.approx(mean, rel=1e-6)
    expected = np.append(law[:9], law[9:].sum()) * 4000
    counts = np.bincount(np.minimum(drawn, 10), minlength=11)[1:]
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    wrong = np.append(stats.poisson.pmf(np.arange(1, 10), mean), stats.poisson.sf(9, mean))
    assert stats.chisquare(counts, wrong / wrong.sum() * 4000).pvalue < 1e-4


def test_poisson_number_of_trials() -> None:
    with fixed_draws(0):
        drawn = [module.number_of_trials(2.75, "poisson", 0.0) for _ in range(4000)]
    counts = np.bincount(np.minimum(drawn, 9), minlength=10)
    expected = np.append(stats.poisson.pmf(np.arange(9), 2.75), stats.poisson.sf(8, 2.75)) * 4000
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    with pytest.raises(AccountingError, match="no theorem"):
        module.number_of_trials(3.0, "fixed", 0.0)


def test_a_fixed_number_of_trials_is_composed(tmp_path: Path) -> None:
    payer, runs = account(tmp_path, composition="pld"), []

    def noted(candidate: float, trial: dpft.Trial) -> Any:
        runs.append(candidate)
        return train(candidate, trial)

    best = tune(payer, tmp_path / "t", distribution="fixed", trials=3, train=noted)
    assert best is not None and "3 trials, all of them composed" in best.tuning
    assert payer.uses() == [(STEP, 15), (FIGURE, 3)] and len(runs) == 3
    for trials in (2.5, math.nan, math.inf):
        with pytest.raises(PrivacyConfigError, match="whole number"):
            tune(payer, tmp_path / "t", distribution="fixed", trials=trials)
    with pytest.raises(AccountingError, match="whole number"):
        tune(payer, tmp_path / "t", trial=[(STEP, 2.5)])
    shuffled = Mechanism(sampler="shuffle", noise_multiplier=9.0, batch_size=10, dataset_size=1000)
    assert module._fixed(((shuffled, 50),), 3)[0] == [(shuffled, 50)] * 3  # each starts an epoch


# --------------------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize(
    ("releases", "times"), [([(STEP, 6)], 1), ([(STEP, 3)], 2), ([(STEP.with_noise(3.0), 1)], 1), ([(FIGURE, 2)], 1)]
)
def test_a_trial_releases_what_was_declared(tmp_path: Path, releases: Any, times: int) -> None:
    payer = account(tmp_path)

    def greedy(candidate: float, trial: dpft.Trial) -> Any:
        for _ in range(times):
            trial.spend(releases, "a training")
        pytest.fail("it was admitted")

    with pytest.raises(BudgetExceededError, match="declare in trial"):
        tune(payer, tmp_path / "t", train=greedy)
    assert len(payer.entries()) == 1  # the search stays paid for


def test_a_trial_takes_back_what_a_run_did_not_use_and_ends_with_itself(tmp_path: Path) -> None:
    trial = dpft.Trial(account(tmp_path), TRIAL, tmp_path)
    trial.reserve("run", [(STEP, 5)], "a training")
    trial.reserve("run", [(STEP, 2), (STEP, 3)], "it goes on", released=[(STEP, 2)])
    with pytest.raises(BudgetExceededError):
        trial.reserve("other", [(STEP, 1)], "another")
    trial.finish("run", [(STEP, 4)])
    trial.reserve("other", [(STEP, 1)], "another")
    trial.end()
    with pytest.raises(BudgetExceededError, match="over"):
        trial.spend([(FIGURE, 1)], "a figure")


def test_a_trial_takes_over_no_run_of_another_one(tmp_path: Path) -> None:
    """The theorems are of trials that do not know of each other: one that goes on from another's weights does."""
    trial = dpft.Trial(account(tmp_path), TRIAL, tmp_path)
    with pytest.raises(LedgerError, match="another trial"):
        trial.reserve("run", [(STEP, 3), (STEP, 2)], "it goes on", released=[(STEP, 3)])


def test_what_a_trial_has_released_stays_counted(tmp_path: Path) -> None:
    trial = dpft.Trial(account(tmp_path), TRIAL, tmp_path)
    paid = trial.spend(iter([(FIGURE, 1)]), "a figure")  # type: ignore[arg-type]  # not as annotated
    trial.reserve("run", [(STEP, 5)], "a training")
    trial.finish("run", [(STEP, 4)])
    for name, fewer in ((paid, []), ("run", [(STEP, 3)])):
        with pytest.raises(LedgerError, match="more releases"):
            trial.finish(name, fewer)
        with pytest.raises(LedgerError, match="more releases"):
            trial.reserve(name, [(STEP, 1)], "an old copy", released=fewer)
    with pytest.raises(LedgerError, match="no use named"):
        trial.finish("other", [])
    for count in (0.5, -1, True):
        with pytest.raises(AccountingError, match="whole number"):
            trial.spend([(STEP, count)], "less than nothing")  # type: ignore[list-item]  # not as annotated
    trial.finish("run", [(STEP, 4)])
    with pytest.raises(BudgetExceededError):
        trial.spend([(FIGURE, 1)], "another figure")


def test_a_second_copy_of_a_trials_run_is_refused(tmp_path: Path) -> None:
    """Both would release what is counted once."""
    trial = dpft.Trial(account(tmp_path), TRIAL, tmp_path)
    with Ledger.open(tmp_path / "a.jsonl", "new", mechanism=STEP) as ledger:
        run = ledger.run_id
    trial.reserve(run, [(STEP, 5)], "a training", ledger=tmp_path / "a.jsonl")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(LedgerError, match="copy"):
        trial.reserve(run, [(STEP, 5)], "its copy", ledger=tmp_path / "b.jsonl")
    trial.reserve(run, [(STEP, 5)], "itself", ledger=tmp_path / "a.jsonl")


def test_a_trial_is_not_copied(tmp_path: Path) -> None:
    """Each copy, in whatever process, would have the budget of one trial."""
    trial = dpft.Trial(account(tmp_path), TRIAL, tmp_path)
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied"):
            make(trial)
    child = os.fork()
    if not child:
        try:
            trial.spend([(FIGURE, 1)], "a figure in a child")
        except LedgerError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_trial_of_shuffled_trainings_counts_their_epochs(tmp_path: Path) -> None:
    """Two trainings of half an epoch can both draw the same example; one of a whole epoch draws it once."""
    shuffled = Mechanism(sampler="shuffle", noise_multiplier=9.0, batch_size=10, dataset_size=1000)
    payer = account(tmp_path, adjacency="zero_out")
    trial = dpft.Trial(payer, [(shuffled, 100)], tmp_path)
    trial.reserve("run", [(shuffled, 50)], "a training")
    with pytest.raises(BudgetExceededError):
        trial.reserve("other", [(shuffled, 50)], "another")
    with pytest.raises(BudgetExceededError):
        trial.reserve("run", [(shuffled, 20), (shuffled, 30)], "it goes on", released=[(shuffled, 20)])
    trial.reserve("run", [(shuffled, 100)], "a whole epoch")


CORRELATED = [
    Mechanism(
        sampler="cyclic_poisson",
        noise_multiplier=1.5,
        sample_rate=0.05,
        strategy=Strategy(kind="bandmf", steps=40, min_separation=4, weights=(1.0, 0.5, 0.3, 0.2)),
    ),
    Mechanism(
        sampler="fixed_order",
        noise_multiplier=4.0,
        batch_size=10,
        dataset_size=100,
        strategy=Strategy(kind="blt", steps=40, min_separation=10, weights=(0.3, 0.2), decays=(0.9, 0.4)),
    ),
]


@pytest.mark.parametrize("mechanism", CORRELATED, ids=["bandmf", "blt"])
def test_a_trial_of_trainings_with_correlated_noise_counts_each_by_itself(tmp_path: Path, mechanism: Any) -> None:
    payer = account(tmp_path, adjacency="zero_out", epsilon=60.0)
    trial = dpft.Trial(payer, [(mechanism, 40), (mechanism, 10)], tmp_path)
    trial.reserve("a", [(mechanism, 10)], "a short one")
    trial.reserve("a", [(mechanism, 10), (mechanism, 20)], "it goes on", released=[(mechanism, 10)])
    trial.reserve("b", [(mechanism, 10)], "another short one")
    with pytest.raises(BudgetExceededError):  # 30 and 11 are not within 40 and 10, though they are fewer together
        trial.reserve("b", [(mechanism, 11)], "another")
    with pytest.raises(BudgetExceededError):
        trial.reserve("c", [(mechanism, 1)], "a third")
    assert module._fixed(((mechanism, 40),), 3)[0] == [(mechanism, 40)] * 3


def test_a_trial_asks_what_an_example_is(tmp_path: Path) -> None:
    """As the account does, which the search has paid for its own unit."""
    payer = account(tmp_path, unit="user")

    def of(item: Any) -> Any:
        def train(candidate: float, trial: dpft.Trial) -> tuple[float, None]:
            trial.reserve("run", [(STEP, 5)], "a training", item=item)
            return 1.0, None

        return tune(payer, tmp_path / "t", train=train, scores="public", trials=1)

    assert of("user") is not None and payer.entries()[0].item == "user"
    with pytest.raises(AccountingError, match="account for the unit"):
        of("example")


def test_scores_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    payer = account(tmp_path)
    elsewhere = dpft.private_mean([0.5], low=0, high=1, account=payer, noise_multiplier=50.0)
    for score, scores in ((0.7, "private"), (elsewhere, "private"), (elsewhere, "public")):
        with pytest.raises(PrivacyConfigError, match="score is a"):
            tune(payer, tmp_path / "t", train=lambda c, t, s=score: (s, None), scores=scores)
    with pytest.raises(PrivacyConfigError, match="expected 'private' or 'public'"):
        tune(payer, tmp_path / "t", scores="other")


def test_nan_is_the_worst_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "number_of_trials", lambda *_: 40)

    def public(candidate: float, trial: dpft.Trial) -> tuple[float, None]:
        return (math.nan if candidate == 0.1 else -5.0), None

    best = tune(account(tmp_path), tmp_path / "t", train=public, scores="public")
    assert best is not None and best.candidate == 0.9


def test_what_has_no_theorem_or_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "number_of_trials", lambda *_: pytest.fail("it began"))
    with pytest.raises(AccountingError, match="Renyi DP"):
        tune(account(tmp_path / "pld", composition="pld"), tmp_path / "t")
    payer = account(tmp_path, epsilon=0.4)
    with pytest.raises(BudgetExceededError):
        tune(payer, tmp_path / "t")
    for changes in ({"candidates": []}, {"trials": 0.5}, {"trial": []}, {"distribution": "uniform"}, {"shape": -1.0}):
        with pytest.raises(PrivacyConfigError):
            tune(payer, tmp_path / "t", **changes)
    assert payer.entries() == ()
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    with pytest.raises(EngineError, match="2 processes"):
        tune(payer, tmp_path / "t")
