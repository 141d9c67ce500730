"""A run that is killed and resumed: it never forgets a release, never repeats noise, never exceeds its plan.

Real processes, killed with SIGKILL at random instants, resumed by new ones with `accelerator.load_state`.
All labels are -100, so every example's gradient is zero and what reaches the inner optimiser *is* the noise.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dpft
from dpft import BudgetExceededError, LedgerError
from tests.training import Training, config, examples, tiny_llama, values

KILLS = 8
STEPS = 150
MOST = 17  # releases of a life that is to be killed, and one more in which it waits: KILLS times as many are < STEPS
BLOCK = 16

# The parent imports once and forks a child for each life of the run, so that a kill costs no start of Python.
SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
from tests import test_resume
test_resume.warm()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            folder, most = line.rsplit(maxsplit=1)
            test_resume.live(folder, most=int(most))
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    print(child, flush=True)
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def silent_examples() -> list[dict[str, Any]]:
    return [{**example, "labels": torch.full_like(example["labels"], -100)} for example in examples()]


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, oldest first."""
    return sorted(folder.glob("state-*"), key=lambda path: int(path.name.split("-")[1]))


def warm() -> None:
    """What every life would import and compute anew."""
    with tempfile.TemporaryDirectory() as folder:
        live(folder, 4)
    config(num_steps=STEPS).resolve(12).meter().at(1)


def live(name: str, steps: int = STEPS, most: int = STEPS) -> None:
    """One life of a run: start or resume, train, save every few steps, until the end or the kill.

    It waits for the kill within the release after ``most``, as it would end before where the machine is too busy to
    kill it in time.
    """
    folder = Path(name)
    states, started = checkpoints(folder), (folder / "side").exists()
    training = Training(
        folder / "ledger",
        dataset=silent_examples(),
        make=lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9),
        test_seed=None,
        continue_ledger=started and not states,  # killed before its first checkpoint
        changes={"num_steps": steps},
    )
    if states:
        training.accelerator.load_state(str(states[-1]))
    side = os.open(folder / "side", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(**fields: Any) -> None:
        os.write(side, (json.dumps(fields) + "\n").encode())  # one write: whole, or not there

    began, finite = training.run.steps, bool(values(training.model).isfinite().all())
    tell(start=training.run.steps, epsilon=training.run.epsilon(), finite=finite)
    step = training.inner.step

    def spied(*args: Any) -> None:
        """Says what is being released, at the last instant before it is."""
        blocks = [p.grad.flatten()[:BLOCK].tolist() for p in training.model.parameters() if p.grad is not None]
        tell(release=training.run.steps, blocks=blocks)
        if training.run.steps - began > most:
            time.sleep(600)
        step(*args)

    training.inner.step = spied  # type: ignore[method-assign]  # a spy takes its place
    for _ in training.physical():
        if training.loader.is_last and (training.loader.step + 1) % 4 == 0:
            unfinished = folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            training.accelerator.save_state(str(unfinished))
            unfinished.rename(folder / f"state-{training.run.steps}")
    report = training.run.report()
    tell(end=training.run.steps, epsilon=report["epsilon_spent"], private=report["private"])


class Server:
    """Lives of runs, one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _line(self) -> str:
        """The next of our lines; libraries print too."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("end ") or line.strip().isdigit():
                return line
        raise AssertionError("the server died")

    def start(self, folder: Path, most: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {most}\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Exit code of the life that was started; -9 after SIGKILL."""
        return int(self._line().split()[1])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def lines_of_releases(ledger: Path) -> int:
    """Whole ones; counted without dpft."""
    content = ledger.read_bytes() if ledger.exists() else b""
    return sum(line.startswith(b'{"release":') for line in content.split(b"\n")[:-1])


def lines(folder: Path) -> int:
    side = folder / "side"
    return side.read_bytes().count(b"\n") if side.exists() else 0


def read_side(folder: Path) -> list[dict[str, Any]]:
    side = folder / "side"
    return [json.loads(line) for line in side.read_text().splitlines()] if side.exists() else []


@pytest.mark.slow
def test_sigkill_at_random_instants(tmp_path: Path, server: Server) -> None:
    dice, ledger = random.Random(1), tmp_path / "ledger"
    counts: list[int] = []
    for kill in range(KILLS):
        known = lines(tmp_path)
        child = server.start(tmp_path, MOST)
        deadline = time.monotonic() + 120
        # One in four while it starts, the others some releases after; in the midst of whatever it is doing.
        started = 0 if kill % 4 == 3 else 1 + dice.randrange(10)
        while lines(tmp_path) < known + started:
            assert time.monotonic() < deadline, "the child does not train"
            os.kill(child, 0)  # raises where it died by itself
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL
        released = sum("release" in line for line in read_side(tmp_path))
        count = lines_of_releases(ledger)
        assert count >= released  # never fewer lines than parameters were about to change
        assert count >= max(counts, default=0)
        states = checkpoints(tmp_path)
        assert not states or int(states[-1].name.split("-")[1]) <= count
        counts.append(count)
    assert 10 < counts[-1] < STEPS, "the kills came too early or too late to say anything"
    server.start(tmp_path, STEPS)
    assert server.end() == 0, "the resumed run did not finish"

    side = read_side(tmp_path)
    (end,) = (line for line in side if "end" in line)
    releases = [line for line in side if "release" in line]
    assert end["end"] == STEPS and STEPS - KILLS <= lines_of_releases(ledger) <= STEPS
    # At most one line per kill is of a release that did not come to be.
    assert STEPS - KILLS <= len(releases) <= STEPS
    numbers = [line["release"] for line in releases]
    assert numbers == sorted(set(numbers))
    # Every start reports at least what was spent before it, and epsilon grows with it up to the plan's.
    spent, starts = 0, []
    for line in side:
        spent += "release" in line
        if "start" in line:
            assert line["start"] >= spent and line["finite"]
            starts.append((line["start"], line["epsilon"]))
    assert starts == sorted(starts) and len(starts) >= KILLS // 2 and starts[-1][1] > 0
    schedule: dpft.PrivacySchedule = config(num_steps=STEPS).resolve(12)
    assert end["private"] and starts[-1][1] <= end["epsilon"] == pytest.approx(schedule.epsilon, rel=1e-12)

    # The noise: N(0, (1/6)^2), no block of it ever twice, in no release and no life.
    blocks = [tuple(block) for line in releases for block in line["blocks"]]
    wide = [block for block in blocks if len(block) == BLOCK]
    assert len(wide) == len(blocks) == len(set(blocks)) > 1000
    x = torch.tensor(wide, dtype=torch.float64).flatten()
    assert abs(x.std() * 6 - 1) < 5 / math.sqrt(2 * len(x)) and abs(x.mean() * 6) < 5 / math.sqrt(len(x))
    # 32 random bits per value: values that repeat do so by chance, blocks never; eight releases' worth would.
    assert x.unique().numel() > 0.995 * len(x)


# --- what a checkpoint may be loaded with ----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def saved(path: Path, at: int, until: int, **options: Any) -> Path:
    """A run that saves after `at` steps, dies after `until`; the checkpoint."""
    training = Training(path, **options).train(at)
    state = path.parent / f"state-{path.name}"
    training.accelerator.save_state(str(state))
    if until > at:
        training.train(until - at)
    training.close()
    return state


def test_a_checkpoint_behind_the_ledger_continues_from_the_ledgers_count(path: Path) -> None:
    state = saved(path, 1, 2)
    training = Training(path)
    training.accelerator.load_state(str(state))
    assert training.run.steps == 2
    training.train()
    assert training.run.steps == lines_of_releases(path) == 3
    assert list(training.loader) == []
    before = values(training.model)
    with pytest.raises(BudgetExceededError):
        training.optimizer.step()
    assert torch.equal(values(training.model), before)


def test_a_ledger_behind_the_checkpoint_is_refused(path: Path) -> None:
    """An old copy of the ledger would make releases undone."""
    state = saved(path, 2, 2)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert sum(b'"release"' in line for line in lines) == 2
    path.write_bytes(b"".join(lines[:-1]))
    training = Training(path)
    with pytest.raises(LedgerError, match="counts 2 releases"):
        training.accelerator.load_state(str(state))
    before = values(training.model)
    with pytest.raises(LedgerError):
        training.one_batch(step=True)
    assert torch.equal(values(training.model), before) and training.run.steps == 1


@pytest.mark.parametrize("empty", [True, False])
def test_the_ledger_of_another_run_is_refused(path: Path, empty: bool) -> None:
    state = saved(path, 1, 1)
    other = path.with_name("other")
    if not empty:
        saved(other, 2, 2)
    training = Training(other)
    with pytest.raises(LedgerError, match="belongs to run"):
        training.accelerator.load_state(str(state))
    if not empty:
        with pytest.raises(LedgerError):
            training.one_batch(step=True)


def test_a_lost_ledger_is_not_replaced_by_an_empty_one(path: Path) -> None:
    state = saved(path, 1, 1)
    path.unlink()
    training = Training(path)
    with pytest.raises(LedgerError):
        training.accelerator.load_state(str(state))


def test_two_resumes_of_one_checkpoint_have_different_noise(path: Path, tmp_path: Path) -> None:
    """The difference of two models with the same noise would be the difference of their data alone."""
    state = saved(path, 1, 1, test_seed=None)
    lost = path.read_bytes()
    models = []
    for copy in range(2):
        ledger = tmp_path / f"copy{copy}"
        ledger.write_bytes(lost)
        training = Training(ledger, dataset=silent_examples(), test_seed=None)
        training.accelerator.load_state(str(state))
        models.append(values(training.train(1).model))
    start = Training(tmp_path / "unused", test_seed=None)
    assert (models[0] != models[1]).double().mean() > 0.99
    assert values(start.model).equal(values(tiny_llama()))


def test_a_resumed_test_seed_does_not_repeat_its_noise(path: Path) -> None:
    """Nor do its first releases: a known seed and a count say which noise it was."""
    changes = {"num_steps": 2}

    def moved(training: Training) -> torch.Tensor:
        before = values(training.model)
        return values(training.train(1).model) - before

    first = Training(path, dataset=silent_examples(), changes=changes)
    noise = moved(first)
    first.accelerator.save_state(str(path.with_name("state")))
    first.run.close()
    resumed = Training(path, dataset=silent_examples(), changes=changes)
    resumed.accelerator.load_state(str(path.with_name("state")))
    assert (moved(resumed) - noise).abs().mean() > 0.5 * noise.abs().mean() > 0


def test_the_state_has_no_seed_and_a_global_one_has_no_say(path: Path) -> None:
    """`load_state` restores torch's and numpy's generators, to the same state for both."""
    state = saved(path, 1, 1, test_seed=None)
    custom = torch.load(next(state.glob("custom_checkpoint_*.pkl")), weights_only=True)
    assert set(custom) == {"run_id", "count"} and custom["count"] == 1
    optimizer = torch.load(next(state.glob("optimizer*.bin")), weights_only=True)
    assert set(optimizer) == {"state", "param_groups"}


def test_resuming_continues_the_training_bitwise(tmp_path: Path) -> None:
    """Momenta, parameters and the number of steps come back: as if it had never stopped."""

    def options() -> dict[str, Any]:
        changes = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 5}
        return {"make": lambda ps: torch.optim.AdamW(ps, lr=0.01), "changes": changes}

    whole = values(Training(tmp_path / "whole", **options()).train().model)
    state = saved(tmp_path / "parts", 2, 2, **options())
    training = Training(tmp_path / "parts", **options())
    training.accelerator.load_state(str(state))
    assert torch.equal(values(training.train().model), whole) and training.run.steps == 5


def test_loading_in_mid_batch_drops_what_was_accumulated(tmp_path: Path) -> None:
    """Else the examples of the abandoned batch would be in the next one too."""
    changes = {"noise_multiplier": 0, "sample_rate": 1.0, "num_steps": 4}
    training = Training(tmp_path / "a", changes=changes).train(1)
    training.accelerator.save_state(str(tmp_path / "state"))
    at = values(training.model)
    training.train(1)
    expected = values(training.model)
    for batch in training.loader:
        training.backward(batch)
        training.optimizer.step()
        training.optimizer.zero_grad()
        if not training.loader.is_last:
            break
    training.accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(values(training.model), at) and training.run.steps == 2
    training.train(1)
    assert torch.equal(values(training.model), expected) and training.run.steps == 3
