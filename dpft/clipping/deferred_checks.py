"""Checks that are computed on the device during a logical batch, and read once, before its release.

Reading a value synchronises the host with the device: one synchronisation in a backward costs more than many kernels.
Nothing of a batch leaves the machine before its release, so that is early enough to refuse it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpft.errors import ClippingError


class DeferredChecks:
    """Flags and loss factors, accumulated on the device.

    Attributes:
        deferred: whether :meth:`check` is called before each release. If not, a failed check raises at once.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._wrong: dict[str, Tensor] = {}
        self._scales: Tensor | None = None

    def clear(self) -> None:
        """Discard the findings of a batch that was dropped."""
        self._wrong, self._scales = {}, None

    def refuse_if(self, wrong: Tensor, message: str) -> None:
        """Refuse the release, with ``message``, if ``wrong`` (``[]`` bool) is true.

        Raises:
            ClippingError: at once, if not :attr:`deferred`.
        """
        if not self.deferred:
            if bool(wrong):
                raise ClippingError(message)
            return
        before = self._wrong.get(message)
        self._wrong[message] = wrong if before is None else before.logical_or_(wrong.to(before.device))

    def note_scale(self, scale: Tensor) -> None:
        """Record the factor ``[]`` by which a loss was multiplied before its backward."""
        seen = scale.detach().double().expand(2).clone()
        if self._scales is not None:
            before = self._scales.to(seen.device)
            seen = torch.stack([torch.minimum(before[0], seen[0]), torch.maximum(before[1], seen[1])])
        self._scales = seen

    def check(self, expected_scale: float) -> None:
        """Read all findings in one transfer and discard them if all is well; a failure stays until :meth:`clear`.

        Args:
            expected_scale: the factor that every loss should have been multiplied by; it multiplies the sensitivity.

        Raises:
            ClippingError: the first check that failed.
        """
        wrong, scales = self._wrong, self._scales
        parts = [flag.double().reshape(1) for flag in wrong.values()]
        parts += [] if scales is None else [scales]
        if not parts:
            return
        values = torch.cat([part.to(parts[0].device) for part in parts]).tolist()
        for message, value in zip(wrong, values, strict=False):
            if value:
                raise ClippingError(message)
        scale = expected_scale if scales is None else max(values[-2:], key=lambda value: abs(value - expected_scale))
        if not abs(scale - expected_scale) <= 1e-6 * expected_scale:
            raise ClippingError(
                f"a loss was multiplied by {scale:g} before backward; expected {expected_scale:g}. That factor "
                "multiplies the clipped sum and with it the sensitivity. Call backward on model(**batch).loss itself; "
                "to change the step size change the learning rate."
            )
        self.clear()
