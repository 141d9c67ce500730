"""What the ranks of one training must agree on before it begins: their data, model, and versions."""

from __future__ import annotations

import hashlib
import hmac
import pickle
import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from dpft.rules.base import full_shape


def described(model: nn.Module) -> list[tuple[str, list[int], str, bool]]:
    """Name, shape, dtype and whether it is trained, of every parameter."""
    return [(name, list(full_shape(p)), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]


def weights(accelerator: Any, model: nn.Module) -> dict[str, float]:
    """Sums of the trainable parameters that have values on this rank, to be compared between ranks.

    FSDP2 takes each shard from its own rank, so adapters that were initialised differently on each rank would be
    mixed. The other engines broadcast rank 0's parameters, and so does FSDP2's ``cpu_ram_efficient_loading``.
    """
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        return {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.device.type != "meta"]
    return {name: float(p.detach().sum(dtype=torch.float64)) for name, p in named}


def versions() -> dict[str, str]:
    """Versions that must be the same on all ranks.

    Another random generator would give one example to two ranks; another accountant would calibrate another noise.
    """
    names = ("accelerate", "deepspeed", "dp-accounting", "dpft", "numpy", "scipy", "torch", "transformers")
    found = {}
    for name in names:
        try:
            found[f"version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    found["version of python"] = ".".join(platform.python_version_tuple()[:2])
    return found


def mark(key: bytes, *parts: bytes) -> str:
    """A digest of bytes, in eight characters; the key is new in each run, so that it says nothing about them."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:8]


def dataset_mark(dataset: Any, key: bytes, count: int = 16) -> str:
    """A keyed digest of some examples in their order, to be compared between ranks.

    Each rank draws indices of its own examples. If the ranks order the examples differently (an unseeded shuffle or
    split on each rank), one example could be in the batches of two ranks and count twice.

    Args:
        dataset: with ``len`` and indexing.
        key: the same on all ranks and new in each run, so that the digest says nothing about the examples.
        count: number of examples to read, spread over the dataset.

    Returns:
        Eight characters; ``"random"`` where an example read twice is not the same, so that nothing can be compared.
    """
    places = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, count)})
    marks = [mark(key, *(_bytes(dataset[i]) for i in places)) for _ in range(2)]
    return marks[0] if marks[0] == marks[1] else "random"


def _bytes(item: Any) -> bytes:
    if isinstance(item, torch.Tensor):
        return str((item.dtype, item.shape, item.tolist())).encode()
    if isinstance(item, dict):
        return b"".join(_bytes(name) + _bytes(item[name]) for name in sorted(item, key=str))
    if isinstance(item, list | tuple):
        return b"".join(_bytes(part) for part in item)
    try:
        return pickle.dumps(item)
    except Exception:
        return type(item).__name__.encode()
