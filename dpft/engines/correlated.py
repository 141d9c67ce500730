"""Correlated noise under the engines: the secrets of a run on all ranks, and what a resume must have in common."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from torch import nn

from dpft.correlated_noise import CorrelatedNoise
from dpft.engines.agreement import described, versions
from dpft.engines.engine import Kind
from dpft.engines.ranks import Ranks
from dpft.engines.shared_ledger import SharedLedger
from dpft.errors import EngineError
from dpft.privacy.config import PrivacyConfig
from dpft.privacy.correlated import Strategy
from dpft.privacy.noise_secrets import NoiseSecret, begin


def check_correlated(privacy: PrivacyConfig, kind: Kind) -> None:
    """Refuse engines that shard the parameters, whose shards would each have to keep their own earlier noise.

    Raises:
        EngineError: FSDP2 or DeepSpeed.
    """
    if privacy.mechanism != "dp_sgd" and kind not in ("single", "ddp"):
        raise EngineError(
            f"mechanism={privacy.mechanism!r} under {kind}: correlated noise is implemented for one process and for "
            "DDP; use one of them, or mechanism='dp_sgd'."
        )


def correlated_noise(
    strategy: Strategy,
    ranks: Ranks,
    ledger: SharedLedger,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    where: str,
    secret: bytes | None = None,
) -> CorrelatedNoise:
    """The noise of a run, new or resumed; its secret is on disk when this returns. A collective.

    Args:
        strategy: of the schedule.
        ranks: the processes.
        ledger: open.
        model: with its parameters where they are trained.
        optimizer: of the model's parameters, in whose order they get noise.
        where: the engine, and where the sums are.
        secret: a known one, for tests only; None: from the operating system.

    Raises:
        LedgerError: see :func:`dpft.privacy.noise_secrets.begin`.
    """
    environment = _environment(ranks, model, optimizer, where)

    fresh = os.urandom(32) if secret is None else secret

    def write() -> tuple[NoiseSecret, ...]:
        if ranks.rank != 0:
            return ()  # it gets rank 0's
        return begin(ledger.path, ledger.run_id, ledger.count, strategy, environment, fresh)

    return CorrelatedNoise(strategy, ranks.from_first(ranks.together(write)), stream=ranks.rank)


def _environment(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> dict[str, str]:
    """What the numbers that a generator draws depend on, and which of them go to which element."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names.get(id(p)) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    trained = [entry for entry in described(model) if entry[3]]
    parameters = hashlib.sha256(json.dumps([order, trained]).encode()).hexdigest()
    device = ranks.device
    return {
        "the number of processes": str(ranks.world),
        "the engine": where,
        "the device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{name: version for name, version in versions().items() if name.split()[-1] in ("dpft", "numpy", "torch")},
        "the digest of the trained parameters, their order, shapes and dtypes,": parameters[:16],
    }
