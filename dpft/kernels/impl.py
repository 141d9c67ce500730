"""Which implementation of a kernel runs, torch or Triton. One requested by name is never replaced by another."""

from __future__ import annotations

import importlib.util
from typing import Literal

from torch import Tensor

from dpft.errors import KernelError
from dpft.kernels.devices import fastest_impl

Impl = Literal["auto", "torch", "triton"]


# Set while a step on a GPU is simulated with meta tensors.
simulated_gpu = False


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU, or simulates a tensor on one."""
    return x.is_cuda or simulated_gpu


def resolve_impl(x: Tensor, impl: Impl) -> tuple[Literal["torch", "triton"], str]:
    """The implementation that ``impl`` selects on ``x``'s device, and the reason as text.

    Args:
        x: a tensor on the device where the kernel is to run.
        impl: ``"auto"``, or the name of an implementation, which is then used or refused.

    Raises:
        ValueError: an unknown ``impl``.
        KernelError: ``"triton"``, which is not installed or cannot run on ``x``'s device.
    """
    if impl == "auto":
        if fastest_impl(x.device) == "triton" and importlib.util.find_spec("triton") is not None:
            return "triton", "the fastest that was verified on such a device"
        return "torch", "torch: the Triton kernels have not been verified on such a device (dpft/kernels/devices.json)"
    if impl == "torch":
        return "torch", "named"
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}; expected 'auto', 'torch' or 'triton'")
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            "impl='triton' was requested and the package triton is not installed: install dpft[triton], or take "
            "impl='torch'"
        )
    from dpft.kernels import triton as fused

    if not x.is_cuda and not fused.INTERPRETED:
        raise KernelError(
            f"impl='triton' was requested with tensors on {x.device}; Triton runs on CUDA devices. Take impl='torch', "
            "or, to test the kernels in Triton's interpreter, start the process with TRITON_INTERPRET=1"
        )
    return "triton", "named"
