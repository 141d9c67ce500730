"""What is found out on the device during a logical batch, and read once, before its release.

Reading a value makes the host wait until the device has come that far, and the device then waits for the host: one
such point in a backward costs more than many kernels. Nothing of a batch leaves the machine before its release, so
that is early enough to refuse it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpft.errors import ClippingError


class DeferredChecks:
    """Flags and loss factors, accumulated on the device.

    Attributes:
        deferred: whether someone reads them before each release. Where nobody does, a finding is raised where it is
            made.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._wrong: dict[str, Tensor] = {}
        self._scales: Tensor | None = None

    def clear(self) -> None:
        """Forget what was found in a batch that was dropped."""
        self._wrong, self._scales = {}, None

    def refuse_if(self, wrong: Tensor, message: str) -> None:
        """Refuse the release, with ``message``, if ``wrong`` (``[]`` bool) is true.

        Raises:
            ClippingError: at once, where nobody will read it later.
        """
        if not self.deferred:
            if bool(wrong):
                raise ClippingError(message)
            return
        before = self._wrong.get(message)
        self._wrong[message] = wrong if before is None else before.logical_or_(wrong.to(before.device))

    def note_scale(self, scale: Tensor) -> None:
        """Remember the factor ``[]`` that a loss was multiplied by before its backward."""
        seen = scale.detach().double().expand(2).clone()
        if self._scales is not None:
            before = self._scales.to(seen.device)
            seen = torch.stack([torch.minimum(before[0], seen[0]), torch.maximum(before[1], seen[1])])
        self._scales = seen

    def check(self, expected_scale: float) -> None:
        """Read all of it, in one transfer; what is in order is forgotten, what is not stays until :meth:`clear`.

        Args:
            expected_scale: what every loss should have been multiplied by: the sensitivity is multiplied with it.

        Raises:
            ClippingError: what was found.
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
