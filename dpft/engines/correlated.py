"""Correlated noise under the engines: the secrets of a run on all ranks, and what a resume must have in common.

Each owner of a shard draws the noise of its elements, which depends on their place in the model and not on the
sharding (:mod:`dpft.correlated_noise`): the number of processes may change.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import nn

from dpft.correlated_noise import CorrelatedNoise
from dpft.engines.agreement import dataset_mark, described, versions
from dpft.engines.deepspeed_config import offloads_optimizer
from dpft.engines.engine import Kind
from dpft.engines.ranks import Ranks
from dpft.engines.shared_ledger import SharedLedger
from dpft.errors import EngineError
from dpft.privacy.correlated.noise_secrets import NoiseSecret, begin
from dpft.privacy.correlated.strategy import Strategy


def sums_device_of(accelerator: Any, kind: Kind, sums_device: str | None) -> torch.device:
    """Where the sums of this rank are, and their noise is drawn."""
    offloads = sums_device == "cpu"
    if kind == "fsdp2":
        from torch.distributed.fsdp import CPUOffloadPolicy

        offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    elif kind.startswith("zero"):
        offloads = offloads_optimizer(accelerator.state.deepspeed_plugin.deepspeed_config)
    return torch.device("cpu") if offloads else torch.device(accelerator.device)


def correlated_noise(
    strategy: Strategy,
    ranks: Ranks,
    ledger: SharedLedger,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine: str,
    device: torch.device,
    dataset: Any,
    secret: bytes | None = None,
) -> CorrelatedNoise:
    """The noise of a run, new or resumed; its secret is on disk when this returns. A collective.

    Args:
        strategy: of the schedule.
        ranks: the processes.
        ledger: open.
        model: with its parameters where they are trained.
        optimizer: of the model's parameters, in whose order they get noise.
        engine: its name, and what else decides in which order parameters get noise.
        device: from :func:`sums_device_of`.
        dataset: the examples, or what ranks compare in their place: their number and order decide which steps each
            one can be in.
        secret: a known one, for tests only; None: from the operating system.

    Raises:
        EngineError: GPUs of several kinds.
        LedgerError: see :func:`dpft.privacy.correlated.noise_secrets.begin`.
    """
    kinds = sorted(set(ranks.gather(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)))
    if len(kinds) > 1:  # which element a number goes to depends on the GPU, and on another resume it is another's
        raise EngineError(
            f"the ranks draw correlated noise on {', '.join(kinds)}; expected one kind of device, on which a resume "
            "can draw it again. Launch on equal GPUs, or use mechanism='dp_sgd'."
        )
    fresh = os.urandom(32) if secret is None else secret

    def write() -> tuple[NoiseSecret, ...]:
        if ranks.rank != 0:
            return ()  # it gets rank 0's
        environment = _environment(model, optimizer, engine, kinds[0]) | _examples(dataset, ledger.run_id)
        return begin(ledger.path, ledger.run_id, ledger.starts, ledger.count, strategy, environment, fresh)

    return CorrelatedNoise(strategy, ranks.from_first(ranks.together(write)), device, lambda: ledger.count)


def _environment(model: nn.Module, optimizer: torch.optim.Optimizer, engine: str, device: str) -> dict[str, str]:
    """What the numbers that a generator draws depend on, and which of them go to which element."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names.get(id(p)) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    trained = [entry for entry in described(model) if entry[3]]
    parameters = hashlib.sha256(json.dumps([order, trained]).encode()).hexdigest()
    return {
        "the engine": engine,
        "the device of the noise": device,
        **{name: version for name, version in versions().items() if name.split()[-1] in ("dpft", "numpy", "torch")},
        "the digest of the trained parameters, their order, shapes and dtypes,": parameters[:16],
    }


def _examples(dataset: Any, run_id: str) -> dict[str, str]:
    """What decides which steps an example can be in, so that it stays so over a resume.

    With other groups, or another order, an example could be in steps that are nearer to each other than the strategy
    was made for. A sample of 16 examples sees a new order, and one example more or less among many.
    """
    return {
        "the number of examples": str(len(dataset)),
        "the order of the examples (a digest of some)": dataset_mark(dataset, run_id.encode()),
    }
