"""`dpft.prepare(account=...)`: a training pays for all its releases before the first, and gets back what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dpft
from dpft.errors import AccountingError, BudgetExceededError, LedgerError, PrivacyConfigError
from dpft.privacy import Ledger
from tests.training import Training, config, examples

ROOT = Path(__file__).resolve().parent.parent
MECHANISM = config().resolve(len(examples())).mechanism


@pytest.fixture
def account(tmp_path: Path) -> dpft.Account:
    return dpft.Account.create(tmp_path / "account.jsonl", epsilon=20.0, delta=1e-3)


def training(folder: Path, account: Any, **options: Any) -> Training:
    return Training(folder / "ledger.jsonl", account=account, test_seed=None, **options)


def test_the_reservation_is_on_the_disk_before_the_first_release(tmp_path: Path, account: dpft.Account) -> None:
    private = training(tmp_path, account)
    (entry,) = account.entries()
    assert entry.open and entry.uses == ((MECHANISM, 3),) and entry.name == private.run.ledger.run_id
    assert entry.ledger == "ledger.jsonl" and "3 steps" in entry.what
    private.train(2)
    assert account.uses() == [(MECHANISM, 3)]
    private.run.close()
    assert account.uses() == [(MECHANISM, 2)] and not account.entries()[0].open
    private.run.close()  # again
    assert account.account_id in private.run.report()["assumptions"][-1]
    assert Ledger.read(tmp_path / "ledger.jsonl").header["config"]["account"] == account.account_id


def test_a_file_does_for_the_account(tmp_path: Path, account: dpft.Account) -> None:
    private = training(tmp_path, account.path)
    assert account.uses() == [(MECHANISM, 3)]
    private.run.close()
    assert account.uses() == []
    with pytest.raises(LedgerError, match="cannot read the account"):
        training(tmp_path / "b", tmp_path / "missing.jsonl")


def test_a_training_that_does_not_fit_does_not_begin(tmp_path: Path, account: dpft.Account) -> None:
    model = torch.nn.Linear(2, 2)
    steps = account.max_steps(MECHANISM)
    account.reserve("other", [(MECHANISM, steps - 2)], "another training")
    with pytest.raises(BudgetExceededError, match="training of 3 steps does not fit"):
        training(tmp_path, account, model=model)
    assert not hasattr(model, "_dpft_state") and len(account.entries()) == 1
    training(tmp_path, account, changes={"num_steps": 2}).run.close()  # the ledger is free, and two steps fit


def test_a_preparation_that_fails_gives_everything_back(
    tmp_path: Path, account: dpft.Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        assert account.uses() == [(MECHANISM, 3)]
        raise RuntimeError("no room on the device")

    with monkeypatch.context() as patch:
        patch.setitem(dpft.prepare.__globals__, "_assemble", fail)
        with pytest.raises(RuntimeError, match="no room"):
            training(tmp_path, account)
    assert account.uses() == [] and not account.entries()[0].open
    training(tmp_path, account).run.close()


def test_what_no_account_can_pay_for(tmp_path: Path, account: dpft.Account) -> None:
    with pytest.raises(PrivacyConfigError, match="test_seed with an account"):
        Training(tmp_path / "a", account=account, test_seed=1)
    with pytest.raises(AccountingError, match="without noise"):
        training(tmp_path, account, changes={"noise_multiplier": 0.0})
    with pytest.raises(AccountingError, match="protects under"):
        training(tmp_path, account, changes={"sampler": "fixed_size", "accountant": "rdp"})
    assert account.entries() == ()


def test_a_training_that_died_is_settled_and_goes_on(tmp_path: Path, account: dpft.Account) -> None:
    private = training(tmp_path, account).train(2)
    private.accelerator.save_state(str(tmp_path / "state"))
    run_id = private.run.ledger.run_id
    assert account.settle() == []  # it runs
    private.close()  # as the end of its process would, without the end of the run
    assert account.uses() == [(MECHANISM, 3)]
    assert account.settle() == [run_id] and account.uses() == [(MECHANISM, 2)]
    again = training(tmp_path, account)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert account.uses() == [(MECHANISM, 2), (MECHANISM, 1)]
    again.train()
    again.run.close()
    assert sum(count for _, count in account.uses()) == 3 and len(account.entries()) == 1


def test_a_training_that_was_settled_gets_no_more_than_is_left(tmp_path: Path, account: dpft.Account) -> None:
    training(tmp_path, account).train(1).close()
    account.settle()
    account.reserve("other", [(MECHANISM, account.max_steps(MECHANISM))], "another training")
    with pytest.raises(BudgetExceededError):
        training(tmp_path, account)
    assert Ledger.read(tmp_path / "ledger.jsonl").count == 1


def test_a_ledger_stays_with_its_account(tmp_path: Path, account: dpft.Account) -> None:
    training(tmp_path, account).train(1).run.close()
    other = dpft.Account.create(tmp_path / "other.jsonl", epsilon=20.0, delta=1e-3)
    for wrong in (None, other):
        with pytest.raises(LedgerError, match="were paid from"):
            training(tmp_path, wrong)
    assert other.entries() == ()
    (tmp_path / "old").mkdir()
    Training(tmp_path / "old" / "ledger.jsonl", test_seed=None).train(1).close()
    with pytest.raises(LedgerError, match="no account"):
        training(tmp_path / "old", account)


def test_an_old_copy_of_the_account_is_seen(tmp_path: Path, account: dpft.Account) -> None:
    empty = account.path.read_bytes()
    training(tmp_path, account).train(1).run.close()
    account.path.write_bytes(empty)
    with pytest.raises(LedgerError, match="old copy"):
        training(tmp_path, account)


def test_each_start_of_a_shuffled_training_counts(tmp_path: Path) -> None:
    """A resume begins an epoch: an example of the interrupted one may be drawn again."""
    account = dpft.Account.create(tmp_path / "account.jsonl", epsilon=50.0, delta=1e-3, adjacency="zero_out")
    changes = {"sampler": "shuffle", "noise_multiplier": None, "target_epsilon": 12.0, "num_steps": 4}
    first = training(tmp_path, account, changes=changes).train(1)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    mechanism = first.run.schedule.mechanism
    again = training(tmp_path, account, changes=changes)
    history, planned = account.uses()
    assert history == (mechanism, 1) and planned[1] == again.run.last_step - 1
    again.run.close()
    assert account.uses() == [(mechanism, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": "bandmf", "bands": 2, "sampler": "cyclic_poisson", "expected_batch_size": 3},
        {"mechanism": "blt", "buffers": 2, "sampler": "fixed_order", "expected_batch_size": 3},
    ],
    ids=["bandmf", "blt"],
)
@pytest.mark.parametrize("composition", ["pld", "rdp"])
def test_a_training_with_correlated_noise_pays_as_one(
    tmp_path: Path, changes: dict[str, Any], composition: Any
) -> None:
    """In full before the first step, and over a resume: what its own ledger says it spent is what it has paid."""
    account = dpft.Account.create(
        tmp_path / "account.jsonl", epsilon=90.0, delta=1e-3, adjacency="zero_out", composition=composition
    )
    changes = {**changes, "num_steps": 6}
    first = training(tmp_path, account, changes=changes)
    mechanism = first.run.schedule.mechanism
    assert account.uses() == [(mechanism, 6)] and mechanism.strategy is not None
    full = account.spent()
    first.train(3)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.close()
    assert account.settle() == [first.run.ledger.run_id] and account.uses() == [(mechanism, 3)]
    assert account.spent() < full
    again = training(tmp_path, account, changes=changes)
    again.accelerator.load_state(str(tmp_path / "state"))
    assert account.uses() == [(mechanism, 6)] and account.spent() == full
    again.train()
    again.run.close()
    assert account.uses() == [(mechanism, 6)]
    events = again.run.ledger.events()
    assert account.spent() == dpft.privacy.compose_epsilon(events, 1e-3, accountant=composition)


LIFE = """
import sys
from pathlib import Path
import dpft
from tests.training import Training
folder = Path(sys.argv[1])
account = folder / "account.jsonl"
private = Training(folder / "ledger.jsonl", account=account, test_seed=None, changes={"num_steps": 400})
step = private.inner.step
def spied(*args):
    step(*args)
    print("released", private.run.steps, flush=True)
private.inner.step = spied
private.train()
"""


@pytest.mark.slow
def test_sigkill_leaves_the_account_with_all_that_was_released(tmp_path: Path) -> None:
    account = dpft.Account.create(tmp_path / "account.jsonl", epsilon=200.0, delta=1e-3)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LIFE, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = 0
    for line in process.stdout:
        if line.startswith("released"):
            said = int(line.split()[1])
        if said == 7:
            time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            break
    said = max([said, *(int(line.split()[1]) for line in process.stdout if line.startswith("released"))])
    assert process.wait(60) == -signal.SIGKILL
    assert account.uses() == [(account.uses()[0][0], 400)]  # reserved in full, until it is settled
    assert len(account.settle()) == 1
    ((_, counted),) = account.uses()
    assert said <= counted <= said + 1


PAYER = """
import sys
import dpft
from dpft.privacy import Mechanism
account = dpft.Account.open(sys.argv[1])
query = Mechanism(sampler="poisson", noise_multiplier=15.0, sample_rate=1.0)
try:
    while True:
        account.spend([(query, 1)], "a query")
        print("paid", flush=True)
except dpft.BudgetExceededError:
    print("refused", flush=True)
"""


@pytest.mark.slow
def test_processes_that_pay_at_once_and_are_killed(tmp_path: Path) -> None:
    """What a process was told that it had paid is in the file, and all of them together stay within the budget."""
    account = dpft.Account.create(tmp_path / "account.jsonl", epsilon=3.0, delta=1e-5)
    query = dpft.privacy.Mechanism(sampler="poisson", noise_multiplier=15.0, sample_rate=1.0)
    most = account.max_steps(query)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PAYER, str(account.path)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert processes[0].stdout is not None
    for _ in range(5):
        processes[0].stdout.readline()
    processes[0].kill()
    said = [process.communicate(timeout=200)[0].count("paid") for process in processes]
    assert said[0] + 5 + said[1] + said[2] <= len(account.entries()) == most
    assert len(account.entries()) <= said[0] + 5 + said[1] + said[2] + 1  # the one that was on its way
    assert account.max_steps(query) == 0
