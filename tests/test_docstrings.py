"""The examples in the docstrings of public names run: the site shows them beside the signatures."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_pages import DOCS, pieces

_EXAMPLE = re.compile(r"::\n\n((?:(?: {4}.*)?\n)+)")
# What an example takes to be there, by the name that has it. A name that is missing here is a failure.
BEFORE = {
    "dpft.prepare": """
privacy = dpft.PrivacyConfig(target_epsilon=8.0, target_delta=1e-5, expected_batch_size=8, num_steps=2)
""",
    "dpft.by_user": """
names = [number % 40 for number in range(len(dataset))]
privacy = dpft.PrivacyConfig(target_epsilon=8.0, target_delta=1e-5, expected_batch_size=8, num_steps=2)
""",
    "dpft.private_trainer": """
pytest.importorskip("trl", reason="TRL needs Python 3.11")
from trl import SFTConfig, SFTTrainer
from datasets import Dataset
model = "BASE_MODEL"
args = SFTConfig("trained", max_steps=2, max_length=16, per_device_train_batch_size=8, use_cpu=True, bf16=False)
dataset = Dataset.from_dict({"text": [f"record {n}" for n in range(64)]})
privacy = dpft.PrivacyConfig(target_epsilon=8.0, target_delta=1e-5, expected_batch_size=8, num_steps=2)
""",
    "dpft.register_rule": """
class MyLayer(torch.nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
""",
    "dpft.privacy.EpsilonMeter": """
from dpft.privacy import EpsilonMeter, Ledger
schedule = dpft.PrivacyConfig(
    noise_multiplier=1.0, target_delta=1e-5, expected_batch_size=8, num_steps=5
).resolve(1000)
ledger = Ledger.open("ledger.jsonl", "new", mechanism=schedule.mechanism, schedule=schedule.to_dict())
ledger.record()
""",
}


def examples(docstring: str) -> list[str]:
    """The indented blocks after a double colon."""
    return [textwrap.dedent(block) for block in _EXAMPLE.findall(inspect.cleandoc(docstring) + "\n") if block.strip()]


def all_examples() -> dict[str, list[str]]:
    """Of every public name and the members of public classes."""
    found = {}
    for module in map(importlib.import_module, ("dpft", "dpft.privacy", "dpft.audit")):
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, ModuleType):
                continue
            members = vars(thing).values() if inspect.isclass(thing) else ()
            texts = [part.__doc__ for part in (thing, *members) if isinstance(getattr(part, "__doc__", None), str)]
            blocks = [block for text in texts for block in examples(text or "")]
            if blocks and blocks not in found.values():
                found[f"{module.__name__}.{name}"] = blocks
    return found


def test_each_example_has_its_set_up() -> None:
    assert all_examples().keys() == BEFORE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"pytest": pytest}
    quick_start = next(
        p for p in pieces((DOCS / "quickstart.md").read_text(encoding="utf-8")) if p.language == "python"
    )
    base_model = str(DOCS.parent / "recipes" / "assets" / "base_model")
    code = [quick_start.code, BEFORE[name].replace("BASE_MODEL", base_model), *all_examples()[name]]
    for part in code:
        exec(compile(part, name, "exec"), namespace)


def test_examples_are_found() -> None:
    assert examples("Text::\n\n    x = 1\n    y = 2\n\nMore:: \n") == ["x = 1\ny = 2\n\n"]
