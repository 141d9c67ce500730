"""`import dpft` costs little more than torch and numpy, and needs no package before something uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpft import PrivacySchedule, privacy_report
from tests import training

pytestmark = pytest.mark.slow  # each starts a Python
ROOT = Path(__file__).resolve().parent.parent

# Each is imported where it is used. transformers, accelerate and scipy are installed with dpft, and slow.
USED_LATER = ("dp_accounting", "opacus", "datasets", "deepspeed", "matplotlib", "triton", "scipy")
NOT_IMPORTED = (*USED_LATER, "transformers", "accelerate", "peft", "yaml", "tqdm", "torch.utils.flop_counter")

# Measured: 12 modules that are not dpft's (six of psutil, two of numpy, four of the standard library).
MOST_OTHER_MODULES = 30

# None in sys.modules is what the import system takes for "there is no such package".
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({USED_LATER!r}))\n"

STEP = """
import torch
import dpft

layer = torch.nn.Linear(4, 3)
before = layer.weight.detach().clone()
model = dpft.wrap(layer, max_grad_norm=1.0)
optimizer = dpft.DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, 1.0, 8)
dpft.clipped_loss(model, model(torch.ones(8, 4)).square().sum(1)).backward()
optimizer.step()
assert optimizer.releases == 1 and not torch.equal(layer.weight, before)
"""


def run(code: str) -> Any:
    """What ``code`` prints as JSON, in a Python of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def test_import_loads_few_modules() -> None:
    code = """
import json, sys
import numpy, torch
before = set(sys.modules)
import dpft
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = run(code)
    assert "dpft.prepare" in added, "the modules are not counted"
    slow = [name for name in added if any(f"{name}.".startswith(f"{slow}.") for slow in NOT_IMPORTED)]
    assert not slow, f"import dpft imports {slow}: import it where it is used"
    others = [name for name in added if name.split(".")[0] != "dpft"]
    assert len(others) <= MOST_OTHER_MODULES, others


def test_a_step_needs_no_other_package() -> None:
    run(BLOCK + STEP)


def test_a_plan_needs_no_other_package() -> None:
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
import dpft

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
plan = dpft.plan(LlamaForCausalLM(config), batch_size=2, seq_len=8, hardware="h100")
print(plan.batch_size)
"""
    assert run(BLOCK + code) == 2


@pytest.mark.parametrize("missing", ["dp_accounting", "scipy"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_an_epsilon_without_the_accountant_is_one_clear_error(missing: str, accountant: str) -> None:
    code = f"""
import json, sys
sys.modules[{missing!r}] = None
import dpft

config = dpft.PrivacyConfig(
    target_epsilon=3.0, target_delta=1e-6, expected_batch_size=8, num_steps=5, accountant={accountant!r}
)
try:
    config.resolve(1000)
except dpft.MissingPackageError as error:
    print(json.dumps([str(error), error.name, isinstance(error, ImportError), isinstance(error, dpft.DPFTError)]))
"""
    message, name, *kinds = run(code)
    assert "pip install dp-accounting" in message and "\n" not in message
    assert name.split(".")[0] == missing and kinds == [True, True]


TRAIN = """
import json, pathlib, warnings
import dpft
from tests.training import Training, config

path = pathlib.Path({path!r})

def error(act):
    try:
        return repr(act())
    except dpft.DPFTError as raised:
        return type(raised).__name__

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    training = Training(path, changes={changes!r}, test_seed=None).train()
run = training.run
print(json.dumps({{
    "steps": run.steps,
    "warned": [str(w.message) for w in caught if "epsilon" in str(w.message)],
    "described": run.schedule.describe(),
    "one more": error(run.check_budget),
    "exact": error(lambda: run.epsilon(exact=True)),
    "cheap": error(run.epsilon),
    "planned": error(lambda: run.schedule.epsilon),
    "private": error(lambda: run.private),
    "report": error(run.report),
    "resumed": error(lambda: (run.close(), Training(path, changes={changes!r}, test_seed=None, continue_ledger=True))),
}}))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in ({"accountant": "rdp"}, {"sampler": "shuffle", "num_steps": 2})
        ),
    ],
    ids=str,
)
def test_given_noise_trains_without_the_accountant_and_states_no_epsilon(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "ledger"
    found = run(BLOCK + TRAIN.format(path=str(path), changes=changes))
    steps = changes.get("num_steps", 3)
    assert found["steps"] == steps
    assert len(found["warned"]) == 1 and "pip install dp-accounting" in found["warned"][0]
    assert found["described"].startswith("epsilon            NOT COMPUTED")
    assert found["one more"] == "BudgetExceededError"
    for asked in ("exact", "cheap", "planned", "private", "report"):
        assert found[asked] == "MissingPackageError", asked
    # What is left of a shuffle follows from the epsilon; of the other samplers from the number of steps.
    shuffle = changes.get("sampler") == "shuffle"
    assert found["resumed"].startswith("MissingPackageError" if shuffle else "(None, <")

    # Once the package is there, the schedule that the ledger holds gives the epsilon.
    stored = json.loads(path.read_text().splitlines()[0])["schedule"]
    schedule = PrivacySchedule.from_dict(stored)
    planned = training.config(**changes).resolve(training.EXAMPLES)
    assert stored["epsilon"] is None and schedule.computed_epsilon is None
    assert schedule.epsilon == planned.epsilon
    assert privacy_report(schedule, steps)["epsilon_spent"] == pytest.approx(planned.epsilon, rel=1e-12)


def test_a_target_without_the_accountant_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    code = f"""
import json, pathlib
import dpft
from tests.training import Training, tiny_llama

model, path = tiny_llama(), pathlib.Path({str(tmp_path / "ledger")!r})
try:
    Training(path, model=model, changes={{"target_epsilon": 3.0, "noise_multiplier": None}})
except dpft.MissingPackageError:
    dpft.wrap(model)
    print(json.dumps(path.exists()))
"""
    assert run(BLOCK + code) is False


def test_without_noise_nothing_is_computed() -> None:
    code = """
import json
import dpft

config = dpft.PrivacyConfig(noise_multiplier=0, target_delta=1e-6, expected_batch_size=8, num_steps=5)
schedule = config.resolve(1000)
report = dpft.privacy_report(schedule, 5)
print(json.dumps([schedule.private, schedule.describe(), report["epsilon_spent"], report["private"]]))
"""
    private, described, spent, reported = run(BLOCK + code)
    assert not private and described.startswith("NOT PRIVATE") and spent == "inf" and not reported
