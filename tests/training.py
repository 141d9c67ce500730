"""A tiny private training that the tests of the loader, the optimiser, `prepare` and resuming share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import dpft
from accelerate import Accelerator
from tests import zoo

EXAMPLES = 12


def examples(count: int = EXAMPLES, tokens: int = 6) -> list[dict[str, Tensor]]:
    """One dictionary of tensors [T] per example, with prompts and padding."""
    batch = zoo.token_batch(count, tokens)
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator that a user would write."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def new_accelerator(**options: Any) -> Accelerator:
    """On the CPU, whatever an earlier one of this process was made with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def tiny_llama() -> nn.Module:
    """One layer, always the same weights."""
    return zoo.seeded(lambda attention: zoo.llama(attention, num_hidden_layers=1))()


def config(**changes: Any) -> dpft.PrivacyConfig:
    """sigma = 1, q = 1/2, 3 steps; a size of the data that is not even, so that divisors are told apart."""
    values: dict[str, Any] = {
        "target_delta": 1e-3,
        "expected_batch_size": 6,
        "noise_multiplier": 1.0,
        "num_steps": 3,
        **changes,
    }
    return dpft.PrivacyConfig(**values)


class Training:
    """What `dpft.prepare` made of a tiny model, and its loop.

    Args:
        path: of the ledger.
        model: one layer of Llama if not given.
        make: parameters -> optimiser; SGD with a learning rate of 1 if not given.
        dataset: the examples.
        accelerator: a new one on the CPU if not given.
        changes: of the privacy configuration.
        options: of `dpft.prepare`.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: nn.Module | None = None,
        make: Any = None,
        dataset: Any = None,
        accelerator: Accelerator | None = None,
        changes: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        model = tiny_llama() if model is None else model
        self.accelerator = new_accelerator() if accelerator is None else accelerator
        trained = [p for p in model.parameters() if p.requires_grad]
        self.inner = torch.optim.SGD(trained, lr=1.0) if make is None else make(trained)
        options = {"max_physical_batch_size": 4, "test_seed": 3, "ledger_path": path, **options}
        self.model, self.optimizer, self.loader = dpft.prepare(
            self.accelerator,
            model,
            self.inner,
            examples() if dataset is None else dataset,
            config(**(changes or {})),
            **options,
        )

    @property
    def run(self) -> dpft.PrivacyRun:
        """The run behind the loader."""
        return self.loader.privacy

    def backward(self, batch: dict[str, Any]) -> None:
        self.accelerator.backward(self.model(**batch).loss)

    def physical(self) -> Iterator[dict[str, Any]]:
        """Runs the loop; yields each batch after its `step` and before its `zero_grad`."""
        for batch in self.loader:
            self.backward(batch)
            self.optimizer.step()
            yield batch
            self.optimizer.zero_grad()

    def train(self, steps: int | None = None) -> Training:
        """Some logical batches, or all."""
        done = 0
        for _ in self.physical():
            done += self.loader.is_last
            if done == steps:
                self.optimizer.zero_grad()
                break
        return self

    def one_batch(self, step: bool = False) -> None:
        """Forward and backward of one whole logical batch; `step` ends it."""
        for batch in self.loader:
            self.backward(batch)
            if self.loader.is_last:
                break
            self.optimizer.step()
            self.optimizer.zero_grad()
        if step:
            self.optimizer.step()

    def close(self) -> None:
        """Gives the ledger's lock back, as the end of the process would."""
        self.run.ledger.close()


def values(model: nn.Module) -> Tensor:
    """All parameters, flat, a copy."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])
