"""An account of whole trainings: correlated noise beside DP-SGD and queries, users, and trials of any of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import stats

from dpft import Trial
from dpft.errors import AccountingError, BudgetExceededError, LedgerError, PrivacyConfigError
from dpft.privacy import Account, Ledger, Mechanism, PureRelease, Selection, Strategy, compose_epsilon
from dpft.privacy.account import composition

BANDS = Strategy(kind="bandmf", steps=40, min_separation=4, weights=(1.0, 0.5, 0.3, 0.2))
BUFFERS = Strategy(kind="blt", steps=40, min_separation=10, weights=(0.3, 0.2), decays=(0.9, 0.4))
BANDMF = Mechanism(sampler="cyclic_poisson", noise_multiplier=1.5, sample_rate=0.05, strategy=BANDS)
BLT = Mechanism(sampler="fixed_order", noise_multiplier=4.0, batch_size=10, dataset_size=100, strategy=BUFFERS)
DP_SGD = Mechanism(sampler="poisson", noise_multiplier=1.2, sample_rate=0.02)
QUERY = Mechanism(sampler="poisson", noise_multiplier=9.0, sample_rate=1.0)
DELTA = 1e-5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "account.jsonl"


def create(path: Path, **changes: Any) -> Account:
    values = {"epsilon": 20.0, "delta": DELTA, "adjacency": "zero_out", "composition": "pld", **changes}
    return Account.create(path, **values)


def directly(*events: Any) -> float:
    """dp_accounting's own composition, without any of dpft."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    for event, count in events:
        accountant.compose(event, count)
    return float(accountant.get_epsilon(DELTA))


def sampled(sigma: float, q: float) -> Any:
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


# --------------------------------------------------------------------------------------------------- correlated noise
def test_one_pld_of_all_mechanisms_is_dp_accountings(path: Path) -> None:
    """40 steps of BandMF in 4 bands are 10 sampled Gaussians; those of BLT are one, of the noise multiplier."""
    account = create(path)
    account.reserve("a", [(BANDMF, 40)], "bandmf")
    account.reserve("b", [(BLT, 40)], "blt")
    account.reserve("c", [(DP_SGD, 30)], "dp_sgd")
    account.spend([(QUERY, 2)], "two figures")
    gaussian = dp_accounting.GaussianDpEvent
    expected = directly((sampled(1.5, 0.05), 10), (gaussian(4.0), 1), (sampled(1.2, 0.02), 30), (gaussian(9.0), 2))
    assert account.spent() == pytest.approx(expected, rel=2e-3)
    without = directly((sampled(1.5, 0.05), 10), (sampled(1.2, 0.02), 30), (gaussian(9.0), 2))
    assert account.spent() > without * 1.02
    for words in ("correlated noise, bandmf", "correlated noise, blt", "min_separation 10", "40 x step"):
        assert words in account.markdown()


def test_a_training_that_ended_early_is_the_leading_block(path: Path) -> None:
    account = create(path)
    account.reserve("b", [(BLT, 40)], "blt")
    full = account.spent()
    account.finish("b", [(BLT, 15)])  # two participations of one example instead of four
    shorter = 4.0 * BUFFERS.scale / BUFFERS.sensitivity(15)
    assert account.spent() == pytest.approx(directly((dp_accounting.GaussianDpEvent(shorter), 1)), rel=2e-3)
    assert account.spent() < full / 1.2
    account.reserve("a", [(BANDMF, 40)], "bandmf")
    account.finish("a", [(BANDMF, 9)])  # the third round of the bands has begun
    at_nine = account.spent()
    account.finish("a", [(BANDMF, 12)])
    assert account.spent() == at_nine
    account.finish("a", [(BANDMF, 13)])
    assert account.spent() > at_nine


@pytest.mark.parametrize("mechanism", [BANDMF, BLT])
@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_segments_of_one_training_are_one(path: Path, mechanism: Mechanism, kind: str) -> None:
    """Its noise and its steps go on over a resume; two trainings are two."""
    account = create(path, composition=kind)
    account.reserve("run", [(mechanism, 13)], "a training")
    account.finish("run", [(mechanism, 7), (mechanism, 6)])
    assert account.uses() == [(mechanism, 13)]
    account.reserve("run", [(mechanism, 13), (mechanism, 27)], "it goes on", released=[(mechanism, 13)])
    assert account.uses() == [(mechanism, 40)]
    one = account.spent()
    account.spend([(mechanism, 20), (mechanism, 20)], "two trainings")
    assert account.uses() == [(mechanism, 40), (mechanism, 20), (mechanism, 20)]
    parts = [(mechanism, count) for count in (40, 20, 20)]
    assert one < account.spent() == compose_epsilon(parts, DELTA, accountant=kind)  # type: ignore[arg-type]  # one of the two names
    with pytest.raises(LedgerError, match="old copy"):
        account.finish("run", [(mechanism, 39)])
        account.reserve("run", [(mechanism, 38)], "an old ledger", released=[(mechanism, 38)])


def test_settle_reads_a_ledger_of_several_starts(path: Path, tmp_path: Path) -> None:
    account = create(path)
    file = tmp_path / "ledger.jsonl"
    for mode in ("new", "resume"):
        with Ledger.open(file, mode, mechanism=BLT) as ledger:  # type: ignore[arg-type]  # one of the two modes
            account.reserve(ledger.run_id, [(BLT, 40)], "a training", ledger=file)
            for _ in range(6):
                ledger.record()
    assert account.settle() and account.uses() == [(BLT, 12)]


@pytest.mark.parametrize("mechanism", [BANDMF, BLT])
def test_a_line_that_was_cut_off_after_the_last_step_is_no_step(path: Path, tmp_path: Path, mechanism: Any) -> None:
    """Such as that of a start whose disk was full: correlated noise has no epsilon beyond its last step."""
    account = create(path)
    file = tmp_path / "ledger.jsonl"
    with Ledger.open(file, "new", mechanism=mechanism) as ledger:
        account.reserve(ledger.run_id, [(mechanism, 40)], "a training", ledger=file)
        for _ in range(40):
            ledger.record()
    with file.open("ab") as cut:
        cut.write(b'{"segment":1,"ti')
    assert Ledger.read(file).count == 41
    assert account.settle() == [ledger.run_id] and account.uses() == [(mechanism, 40)]
    account.spend([(DP_SGD, 1)], "the next one")
    with pytest.raises(AccountingError, match="made for 40"):
        account.reserve("other", [(mechanism, 41)], "more steps than there are")


def test_a_copy_of_a_run_that_is_open_is_not_paid_for_by_it(path: Path, tmp_path: Path) -> None:
    """Both would release on, each after the releases of the other's beginning, and one of them would be counted."""
    account = create(path)
    first, second = tmp_path / "a" / "ledger.jsonl", tmp_path / "b" / "ledger.jsonl"
    with Ledger.open(first, "new", mechanism=DP_SGD) as ledger:
        ledger.record()
        run = ledger.run_id
    second.parent.mkdir()
    second.write_bytes(first.read_bytes())
    more: dict[str, Any] = {"released": [(DP_SGD, 1)]}
    account.reserve(run, [(DP_SGD, 9)], "a training", ledger=first)
    with pytest.raises(LedgerError, match="the releases of both would be counted once"):
        account.reserve(run, [(DP_SGD, 9)], "its copy", ledger=second, **more)
    assert [entry.what for entry in account.entries()] == ["a training"]
    (tmp_path / "link").symlink_to(first.parent)
    for same in (first, tmp_path / "link" / "ledger.jsonl"):
        account.reserve(run, [(DP_SGD, 9)], "a training", ledger=same, **more)
    assert account.settle() == [run]  # it died: one of the two goes on
    account.reserve(run, [(DP_SGD, 9)], "its copy", ledger=second, **more)
    with pytest.raises(LedgerError, match="the releases of both would be counted once"):
        account.reserve(run, [(DP_SGD, 9)], "a training", ledger=first, **more)
    second.rename(tmp_path / "moved.jsonl")
    account.reserve(run, [(DP_SGD, 9)], "moved", ledger=tmp_path / "moved.jsonl", **more)


def test_a_ledger_is_found_from_behind_a_link(path: Path, tmp_path: Path) -> None:
    """Else a copy of an open run passes for the run, as its first ledger is looked for where it is not."""
    disk = tmp_path / "disk" / "deep"
    disk.mkdir(parents=True)
    (tmp_path / "accounts").symlink_to(disk)  # whose ".." is not the folder that the link is in
    account = create(tmp_path / "accounts" / "account.jsonl", composition="rdp")
    first, copy = tmp_path / "runs" / "a.jsonl", tmp_path / "runs" / "b.jsonl"
    with Ledger.open(first, "new", mechanism=DP_SGD) as ledger:
        account.reserve(ledger.run_id, [(DP_SGD, 9)], "a training", ledger=first)
        ledger.record()
    copy.write_bytes(first.read_bytes())
    path.symlink_to(disk / "account.jsonl")
    for opened in (account, Account.open(path)):  # by a link to its folder, and to itself
        with pytest.raises(LedgerError, match="is a copy of it"):
            opened.reserve(ledger.run_id, [(DP_SGD, 9)], "a copy", ledger=copy, released=[(DP_SGD, 1)])
    assert Account.open(path).settle() == [ledger.run_id] and account.uses() == [(DP_SGD, 1)]


def test_a_start_that_died_before_its_first_release_leaves_no_reservation(path: Path, tmp_path: Path) -> None:
    """The next one takes its place, and if that does not fit, settle() still finds the ledger of the first."""
    account = create(path, composition="rdp", epsilon=3.0)
    most, file = account.max_steps(DP_SGD), tmp_path / "ledger.jsonl"
    for _ in range(2):  # killed, say for its memory
        with Ledger.open(file, "new", mechanism=DP_SGD) as ledger:
            account.reserve(ledger.run_id, [(DP_SGD, most)], "a training", ledger=file)
    assert account.settle() == [ledger.run_id] and account.max_steps(DP_SGD) == most
    other = tmp_path / "copy.jsonl"
    other.write_bytes(file.read_bytes())
    for there, refused in ((file, False), (other, True)):  # a copy of the empty ledger has its id, too
        with Ledger.open(there, "new", mechanism=DP_SGD) as ledger:
            if refused:
                with pytest.raises(LedgerError, match="old copy"):
                    account.reserve(ledger.run_id, [(DP_SGD, 1)], "a copy", ledger=there)
                continue
            account.reserve(ledger.run_id, [(DP_SGD, 2)], "a training", ledger=there)
            ledger.record()
        account.finish(ledger.run_id, [(DP_SGD, 1)])
    assert account.uses() == [(DP_SGD, 1)]


@pytest.mark.parametrize("count", [-1, 2.5, True, math.nan, "3", None, 10**400])
def test_what_could_not_be_read_again_is_not_written(path: Path, tmp_path: Path, count: Any) -> None:
    account = create(path)
    account.reserve("run", [(DP_SGD, np.int64(9))], "a training")
    trial = Trial(account, [(DP_SGD, 9)], tmp_path)
    trial.reserve("run", [(DP_SGD, 9)], "a training")
    for payer in (account, trial):
        with pytest.raises(AccountingError, match="whole number"):
            payer.finish("run", [(DP_SGD, count)])
    assert Account.open(path).uses() == [(DP_SGD, 9)] and account.spent() > 0
    with pytest.raises(BudgetExceededError):
        trial.spend([(DP_SGD, 1)], "more than was declared")


def test_a_name_is_a_text_and_a_header_that_is_none_leaves_no_file(path: Path, tmp_path: Path) -> None:
    account = create(path)
    for name in (5, None, ""):  # in the file it would be "5", of which the next reservation would not know
        with pytest.raises(PrivacyConfigError, match="expected a text"):
            account.reserve(name, [(DP_SGD, 9)], "a training")  # type: ignore[arg-type]  # not as annotated
    with pytest.raises(TypeError, match="int64"):
        create(tmp_path / "other", unit="user", examples_per_user=np.int64(3))
    assert not (tmp_path / "other").exists()
    for changes in ({"batch_size": 2.5}, {"dataset_size": 100.5}, {"batch_size": math.nan}):
        with pytest.raises(PrivacyConfigError, match="whole number"):
            Mechanism(
                **{"sampler": "shuffle", "noise_multiplier": 1.0, "batch_size": 2, "dataset_size": 100, **changes}
            )
    with pytest.raises(PrivacyConfigError, match="whole number"):
        create(tmp_path / "other", unit="user", examples_per_user=2.5)


def test_what_has_ended_gives_nothing_back(path: Path) -> None:
    account = create(path)
    account.reserve("a", [(DP_SGD, 9)], "a training")
    account.finish("a", [(DP_SGD, 7)])
    paid = account.spend([(QUERY, 1)], "a figure")
    for name, fewer in (("a", [(DP_SGD, 5)]), (paid, [])):
        with pytest.raises(LedgerError, match="more releases"):
            account.finish(name, fewer)
    account.finish("a", [(DP_SGD, 8)])
    assert account.uses() == [(DP_SGD, 8), (QUERY, 1)]


def test_max_steps_are_of_one_training(path: Path) -> None:
    account = create(path, epsilon=0.9)
    fits = account.max_steps(BLT)
    assert 0 < fits < 40 and compose_epsilon([(BLT, fits)], DELTA) <= 0.9 < compose_epsilon([(BLT, fits + 1)], DELTA)
    assert create(path.with_name("large"), epsilon=50.0).max_steps(BLT) == 40  # it was made for no more
    sigma = account.noise_multiplier(BLT, 40, rel_tol=1e-2)
    account.reserve("b", [(BLT.with_noise(sigma), 40)], "blt")
    with pytest.raises(AccountingError, match="made for 40"):
        account.reserve("c", [(BLT.with_noise(1000.0), 41)], "blt")


def test_correlated_noise_has_its_adjacency(path: Path) -> None:
    account = create(path, adjacency="add_or_remove_one")
    for mechanism in (BANDMF, BLT):
        with pytest.raises(AccountingError, match="protects under 'zero_out'"):
            account.reserve("run", [(mechanism, 4)], "a training")


def test_an_adaptive_stop_of_correlated_noise_stays_in_the_filter() -> None:
    """The conditional RDP of each step, by example, adds up to no more than what the account counts at any stop.

    That is what the filter's theorem asks: row t of C x + z is, given the rows before, a Gaussian with the mean moved
    by the columns of the steps in which the example was. The worst example is that of the first batch.
    """
    c = BUFFERS.coefficients()
    variance = (4.0 * BUFFERS.scale) ** 2
    order = 8
    place = composition.orders().index(order)
    for first in range(10):  # the step of the example's first batch
        moved = np.zeros(40)
        for start in range(first, 40, 10):
            moved[start:] += c[: 40 - start]
        spent = np.cumsum(order * moved**2 / (2 * variance))
        for stop in (1, 9, 10, 11, 25, 40):
            counted = composition.rdp_curve([(BLT, stop)])[place]
            assert spent[stop - 1] <= counted * (1 + 1e-12)
            if first == 0:
                assert spent[stop - 1] == pytest.approx(counted)


@pytest.mark.parametrize("mechanism", [BANDMF, BLT])
def test_the_best_of_trainings_with_correlated_noise(path: Path, mechanism: Mechanism) -> None:
    account = create(path, composition="rdp", epsilon=60.0)
    selection = Selection(((mechanism, 40), (QUERY, 1)), 3.0, "negative_binomial", 1.0)
    account.spend([(selection, 1)], "a search")
    one = composition.rdp_curve([(mechanism, 40), (QUERY, 1)])
    assert (composition.rdp_curve([(selection, 1)]) > one).all()


# --------------------------------------------------------------------------------------------------- users
@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_users_as_examples_and_rows_of_users_have_one_account(path: Path, kind: str) -> None:
    account = create(path, adjacency="add_or_remove_one", composition=kind, unit="user", examples_per_user=3)
    rows = Mechanism(sampler="poisson", noise_multiplier=3.0, sample_rate=1.0, unit="user", examples_per_user=3)
    account.reserve("run", [(DP_SGD, 100)], "users", item="user")
    account.spend([(rows, 1)], "a figure of rows")
    account.spend([(PureRelease(0.1), 1)], "counts")
    same = [(DP_SGD, 100), (QUERY.with_noise(1.0), 1)]  # three rows with three times the noise
    alone = create(path.with_name("b"), adjacency="add_or_remove_one", composition=kind)
    alone.spend([*same, (PureRelease(0.1), 1)], "the same")
    assert account.spent() == pytest.approx(alone.spent(), rel=1e-6)
    again = Account.open(path)
    assert [entry.item for entry in again.entries()] == ["user", "example", "example"]
    assert again.protects == account.protects and again.spent() == account.spent()


def test_only_a_payer_knows_what_an_example_is(path: Path) -> None:
    users, single = create(path, unit="user"), create(path.with_name("single"))
    for account, item, match in (
        (users, "example", "by_user makes users the examples"),
        (single, "user", "create an account with unit='user'"),
    ):
        with pytest.raises(AccountingError, match=match):
            account.reserve("run", [(BLT, 40)], "a training", item=item)
        with pytest.raises(AccountingError, match=match):
            account.spend([(DP_SGD, 1)], "a use", item=item)
    users.reserve("run", [(BLT, 40)], "a training", item="user")
    users.spend([(BANDMF, 8), (DP_SGD, 10)], "others", item="user")
    with pytest.raises(AccountingError, match="account for the unit"):
        users.spend(
            [(Mechanism(**{**QUERY.to_dict(), "unit": "user", "examples_per_user": 2}), 1)], "rows", item="user"
        )
    expected = compose_epsilon([(BLT, 40), (BANDMF, 8), (DP_SGD, 10)], DELTA)
    assert users.spent() == expected and single.entries() == ()


# --------------------------------------------------------------------------------------------------- selections
def test_selections_are_dp_accountings_event() -> None:
    """Golden: its accountant on its event, where it has one for the trial."""
    for shape in (0.0, 0.5, 1.0, 4.0, math.inf):
        event = dp_accounting.dp_event.RepeatAndSelectDpEvent(
            dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(sampled(1.2, 0.02), 25)]), 6.0, shape
        )
        accountant = dp_accounting.rdp.RdpAccountant()
        accountant.compose(event)
        law: Any = ("poisson", 0.0) if shape == math.inf else ("negative_binomial", shape)
        selection = Selection(((DP_SGD, 25),), 6.0, *law)
        np.testing.assert_allclose(composition.rdp_curve([(selection, 1)]), accountant.rdp, rtol=1e-9)


@pytest.mark.parametrize(
    ("distribution", "shape"), [("poisson", 0.0), ("negative_binomial", 0.0), ("negative_binomial", 2.0)]
)
def test_the_renyi_divergence_of_the_best_stays_below_the_bound(distribution: str, shape: float) -> None:
    """Of the largest of K Gaussian scores on two neighbours, by integration, at each order: more than one trial's.

    The density of the best is that of a trial times the derivative of the generating function of K at its
    distribution function. With a Poisson number there may be none, which has the same probability in both.
    """
    sigma, mean = 2.0, 6.0
    y = np.linspace(-60, 60, 120_001)
    if distribution == "poisson":
        none, slope = math.exp(-mean), lambda f: mean * np.exp(-mean * (1 - f))
    elif shape == 0:
        gamma = _gamma(lambda g: (1 - 1 / g) / math.log(g), mean)
        none, slope = 0.0, lambda f: -(1 - gamma) / (1 - (1 - gamma) * f) / math.log(gamma)
    else:
        gamma = _gamma(lambda g: shape * (1 - g) / (g * (1 - g**shape)), mean)
        scale = shape * (1 - gamma) / (gamma**-shape - 1)
        none, slope = 0.0, lambda f: scale * (1 - (1 - gamma) * f) ** (-shape - 1)
    p, q = (stats.norm.pdf(y, m, sigma) * slope(stats.norm.cdf(y, m, sigma)) for m in (1.0, 0.0))
    step = y[1] - y[0]
    assert p.sum() * step + none == pytest.approx(1.0, rel=1e-6) and q.sum() * step + none == pytest.approx(1.0)
    selection = Selection(((QUERY.with_noise(sigma), 1),), mean, distribution, shape)  # type: ignore[arg-type]  # one of the two names
    curve = composition.rdp_curve([(selection, 1)])
    above = 0
    for order in (1.5, 2.0, 4.0, 8.0):
        moments = (
            np.sum(np.exp(order * np.log(a) + (1 - order) * np.log(b))) * step + none for a, b in ((p, q), (q, p))
        )
        exact = max(math.log(moment) for moment in moments) / (order - 1)
        assert exact <= curve[composition.orders().index(order)]
        above += exact > order / (2 * sigma**2)
    assert above >= 2


def _gamma(mean_of: Any, mean: float) -> float:
    low, high = 1e-9, 1 - 1e-9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(middle) > mean else (low, middle)
    return high
