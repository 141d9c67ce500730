"""`dpft.prepare`: what it refuses, before anything is changed or spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dpft
from dpft.engines.shared_ledger import open_ledger
from dpft.errors import DPFTError, EngineError, LedgerError, PrivacyConfigError, UnsupportedModuleError, WrapError
from dpft.privacy import Ledger
from tests import zoo
from tests.training import Training, examples, new_accelerator, tiny_llama, values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(examples())


class LongStream(Stream):
    def __len__(self) -> int:
        return 12


DATASETS: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(examples(), batch_size=4),  # type: ignore[arg-type]  # a list is a dataset
    "iterable": Stream,
    "iterable with a length": LongStream,
    "streaming": lambda: datasets.Dataset.from_list([{"a": 1}] * 12).to_iterable_dataset(),
    "generator": lambda: (e for e in examples()),
    "set": lambda: set(range(12)),
    "columns": lambda: {f"column{i}": torch.zeros(12) for i in range(12)},
    "splits": lambda: datasets.DatasetDict(
        {f"split{i}": datasets.Dataset.from_list([{"a": 1}] * 12) for i in range(12)}
    ),
    "empty": list,
    "empty Dataset": lambda: datasets.Dataset.from_dict({"a": []}),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_datasets_without_examples_to_draw(path: Path, kind: str) -> None:
    model = tiny_llama()
    with pytest.raises(PrivacyConfigError, match="dataset"):
        Training(path, model=model, dataset=DATASETS[kind]())
    assert not path.exists()
    dpft.wrap(model)  # nothing of the attempt is left on the model


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_engine_settings_that_would_void_the_guarantee(path: Path, options: dict[str, Any], name: str) -> None:
    try:
        accelerator = new_accelerator(**options)
    except ValueError:  # Accelerate itself refuses fp16 without a GPU
        accelerator = new_accelerator()
        accelerator.state._mixed_precision = "fp16"
    with pytest.raises(EngineError, match=name):
        Training(path, accelerator=accelerator)
    assert not path.exists()
    new_accelerator()


def test_more_processes_than_accelerate_sees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = new_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="2 processes"):
        Training(path, accelerator=accelerator)


@pytest.mark.parametrize("changes", [{}, {"noise_multiplier": None, "target_epsilon": 4.0}])
def test_clipping_none_with_noise(path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyConfigError, match="clipping='none'"):
        Training(path, clipping="none", changes=changes)
    assert not path.exists()


@pytest.mark.parametrize("lengths", [[3] * 11, [3.0] * 12, [3] * 11 + [-1]])
def test_lengths_of_other_examples(path: Path, lengths: list[Any]) -> None:
    model = tiny_llama()
    with pytest.raises(PrivacyConfigError, match=r"lengths.*each of 12 examples"):
        Training(path, model=model, lengths=lengths)
    assert not path.exists()
    dpft.wrap(model)


@pytest.mark.parametrize("rows", [0, -1, True, 2.5, "4", None])
def test_physical_batch_size_must_be_whole(path: Path, rows: Any) -> None:
    with pytest.raises(PrivacyConfigError, match="max_physical_batch_size"):
        Training(path, max_physical_batch_size=rows)
    assert not path.exists()


def test_a_model_that_is_wrapped_already(path: Path) -> None:
    with pytest.raises(WrapError, match="wrapped already"):
        Training(path, model=dpft.wrap(tiny_llama()))


def test_a_model_without_rules(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedModuleError):
        Training(path, model=model)


def test_an_optimiser_with_foreign_parameters(path: Path) -> None:
    model, stranger = tiny_llama(), nn.Parameter(torch.zeros(7, 3))
    with pytest.raises(WrapError, match=r"\[7, 3\]"):
        Training(path, model=model, make=lambda ps: torch.optim.SGD([*ps, stranger], lr=1.0))
    other = tiny_llama()
    with pytest.raises(WrapError, match="not clipped"):
        Training(path.with_name("other"), make=lambda _: torch.optim.SGD(other.parameters(), lr=1.0))


def test_a_private_optimiser(path: Path) -> None:
    with pytest.raises(ValueError, match="not private yet"):
        Training(path, make=lambda ps: dpft.DPOptimizer(torch.optim.SGD(ps, lr=1.0), 1.0, 1.0, 6))


def test_a_failed_attempt_leaves_nothing_behind(path: Path) -> None:
    """The error is repaired and the cell is run again, with the same objects."""
    path.write_text("no ledger\n")
    model, accelerator = tiny_llama(), new_accelerator()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        with pytest.raises(LedgerError, match="header"):
            Training(path, model=model, accelerator=accelerator, make=lambda _: optimizer)
    path.unlink()
    training = Training(path, model=model, accelerator=accelerator, make=lambda _: optimizer).train()
    assert training.run.steps == 3 and len(accelerator._custom_objects) == 1


def test_a_ledger_that_another_run_has_open(path: Path) -> None:
    first = Training(path)
    with pytest.raises(LedgerError, match="open"):
        Training(path)
    first.train()
    assert first.run.steps == 3


# --- after prepare ---------------------------------------------------------------------------------------------------


def unfreeze(model: nn.Module) -> None:
    model.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]  # a method, of an HF model


def freeze(model: nn.Module) -> None:
    next(iter(model.model.layers.parameters())).requires_grad_(False)  # type: ignore[union-attr]  # of an HF model


def replace(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # type: ignore[union-attr]  # of an HF model


def add(model: nn.Module) -> None:
    model.register_parameter("more", nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize("when", ["before forward", "before step"])
@pytest.mark.parametrize("change", [unfreeze, freeze, replace, add])
def test_parameters_changed_after_prepare(path: Path, change: Callable[[nn.Module], None], when: str) -> None:
    """An error, before parameters move and before anything is spent."""
    model = zoo.seeded(zoo.frozen_embedding)()
    training = Training(path, model=model, max_physical_batch_size=12)
    training.train(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if when == "before forward":
        change(model)
        with pytest.raises(WrapError):
            training.one_batch(step=True)
    else:
        training.one_batch()
        change(model)
        with pytest.raises(WrapError):
            training.optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert training.run.steps == Ledger.read(path).count == 1


def test_a_group_of_foreign_parameters_added_later(path: Path) -> None:
    training = Training(path)
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.raises(WrapError):
        training.optimizer.add_param_group({"params": [stranger]})
        training.one_batch(step=True)
    assert torch.equal(values(training.model), values(tiny_llama())) and training.run.steps == 0


def test_the_optimiser_of_before_does_not_step(path: Path) -> None:
    """Its old name in the loop would release sums without noise and without a line."""
    training = Training(path)
    training.one_batch()
    with pytest.raises(DPFTError):
        training.inner.step()
    assert torch.equal(values(training.model), values(tiny_llama())) and training.run.steps == 0


def test_a_plain_backward_is_refused(path: Path) -> None:
    training = Training(path)
    batch = next(iter(training.loader))
    with pytest.raises(DPFTError):
        training.model(**batch).logits.sum().backward()
    assert training.run.steps == 0


def test_plan_errors_come_before_anything_is_touched(path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(PrivacyConfigError, match="expected_batch_size"):
        Training(path, model=model, changes={"expected_batch_size": 13})
    assert not path.exists()
    dpft.wrap(model)


@pytest.mark.parametrize(("before", "now"), [(True, False), (False, True)])
def test_a_ledger_of_other_noise_or_without_the_check_of_rows(path: Path, before: bool, now: bool) -> None:
    """The statement says of all releases how the noise was drawn, and whether rows were checked."""

    def begin(secure: bool = False, isolated: bool = True) -> Any:
        private = dpft.PrivacyConfig(
            noise_multiplier=1.0, target_delta=1e-6, num_steps=4, expected_batch_size=2, secure_rng=secure
        )
        return open_ledger(path, private, private.resolve(20), "flash", False, isolated=isolated)

    for setting, words in (("secure", "secure_rng"), ("isolated", "isolat")):
        with begin(**{setting: before}) as ledger:
            ledger.record()
        with pytest.raises(LedgerError, match=words):
            begin(**{setting: now})
        begin(**{setting: before}).close()
        path.unlink()
