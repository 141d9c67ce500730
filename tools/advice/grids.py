"""The settings that are tried, the most telling first: each list can be cut short."""

from __future__ import annotations

from tools.advice.training import Setting

# (batch, steps) of 6,144 examples in all: what is the best way to spend them?
EQUAL_COST = ((512, 12), (256, 24), (1024, 6))


def settings() -> list[Setting]:
    """All of them, without repetition."""
    rates = [Setting(8, b, t, rate) for rate in (5e-3, 1e-2, 2.5e-3) for b, t in EQUAL_COST]
    tight = [Setting(3, b, t, rate) for rate in (5e-3, 1e-2) for b, t in EQUAL_COST]
    clip_norms = [Setting(8, 512, 12, 5e-3, clip_norm) for clip_norm in (0.1, 10.0)]
    twice = [Setting(8, 1024, 12, 5e-3), Setting(8, 512, 24, 5e-3)]
    more_rates = [Setting(8, 1024, 6, 2e-2), Setting(8, 512, 12, 2e-2)]
    lora = [Setting(8, 512, 12, rate, lora_r=8) for rate in (1e-2, 2.5e-2)]
    small = [Setting(8, 128, 48, 2.5e-3), Setting(3, 512, 12, 2.5e-3)]
    again = [Setting(8, 512, 12, 5e-3, 1.0), Setting(3, 512, 12, 5e-3)]  # the spread of fresh noise
    return [*rates[:6], *tight[:3], *clip_norms, *twice, *rates[6:], *tight[3:], *more_rates, *lora, *small, *again]
