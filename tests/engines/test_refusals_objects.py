"""Models, optimisers and data that are refused before anything is touched, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dpft.engines import agreement
from dpft.errors import DPFTError, PrivacyConfigError
from tests.engines.test_refusals import refused
from tests.training import Training, examples, new_accelerator, tiny_llama


def hooked(register: Callable[[nn.Parameter], Any]) -> nn.Module:
    model = tiny_llama()
    register(next(model.parameters()))
    return model


def marked(name: str, value: Any) -> nn.Module:
    model = tiny_llama()
    setattr(model, name, value)
    return model


def compiled_inside() -> nn.Module:
    model: Any = tiny_llama()
    model.model.layers[0].compile(backend="eager")
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fp16 parameters": (lambda: tiny_llama().half(), "float16"),
    "compiled": (lambda: torch.compile(tiny_llama(), backend="eager"), "compiled"),  # type: ignore[return-value, arg-type]  # torch types it as a callable
    "compiled inside": (compiled_inside, "compiled"),
    "DataParallel": (lambda: nn.DataParallel(tiny_llama()), "DataParallel"),
    "tensor parallel": (lambda: marked("_tp_size", 2), "tp_plan"),
    "over two devices": (lambda: marked("hf_device_map", {"a": 0, "b": 1}), "device_map"),
    "gradient hook": (lambda: hooked(lambda p: p.register_hook(lambda g: 10 * g)), "hook"),
    "optimiser in the backward": (
        lambda: hooked(lambda p: p.register_post_accumulate_grad_hook(lambda p: None)),
        "hook",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str) -> None:
    make, match = MODELS[name]
    refused(new_accelerator(), tmp_path / "ledger", match, model=make())


OPTIMISERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "LBFGS": (lambda ps: torch.optim.LBFGS(ps), "closure"),
    "SparseAdam": (lambda ps: torch.optim.SparseAdam(ps), "SparseAdam"),
    "AdaLomo": (lambda ps: type("AdaLomo", (torch.optim.SGD,), {})(ps, lr=1.0), "AdaLomo"),
    "prepared": (lambda ps: new_accelerator().prepare_optimizer(torch.optim.SGD(ps, lr=1.0)), "prepared already"),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(tmp_path: Path, name: str) -> None:
    make, match = OPTIMISERS[name]
    refused(new_accelerator(), tmp_path / "ledger", match, make=make)


def test_a_prepared_loader_or_one_that_drops(tmp_path: Path) -> None:
    accelerator = new_accelerator()
    plain: Any = DataLoader(examples(), batch_size=5, drop_last=True)  # type: ignore[arg-type]  # a list is a dataset
    for loader in (plain, accelerator.prepare_data_loader(plain)):
        with pytest.raises(PrivacyConfigError, match="DataLoader"):
            Training(tmp_path / "ledger", accelerator=accelerator, dataset=loader)


def test_preparing_the_loader_changes_nothing(tmp_path: Path) -> None:
    """Accelerate's own loader would repeat examples to fill ranks; it does not take dpft's for one."""
    training = Training(tmp_path / "ledger")
    assert training.accelerator.prepare(training.loader) is training.loader
    with pytest.raises((AttributeError, TypeError, DPFTError)):
        training.accelerator.prepare_data_loader(training.loader)


def test_the_order_of_examples_is_told_apart() -> None:
    data = examples()
    mark = agreement.dataset_mark(data, b"key")
    assert mark == agreement.dataset_mark([dict(item) for item in data], b"key")
    assert mark != agreement.dataset_mark(data[::-1], b"key") and mark != agreement.dataset_mark(data, b"another")
    counter = iter(range(100))

    class Random:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> int:
            return next(counter)

    assert agreement.dataset_mark(Random(), b"key") == "random"
