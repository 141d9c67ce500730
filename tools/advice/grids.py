"""The settings that are tried, the most telling first: the list can be cut short."""

from __future__ import annotations

from tools.advice.training import Setting


def settings() -> list[Setting]:
    """All of them; one that is there twice is trained twice, which shows the spread of fresh noise."""
    # 6,144 examples in all, then 3,072: what is the best way to spend them?
    twice = [Setting(8, batch, steps, 5e-3) for batch, steps in ((512, 12), (256, 24), (1024, 6))]
    rates = [Setting(8, 256, 12, rate) for rate in (2.5e-3, 5e-3)]
    clip_norms = [Setting(8, 256, 12, 5e-3, clip_norm) for clip_norm in (0.1, 10.0)]
    tight = [Setting(3, 256, 12, rate) for rate in (5e-3, 2.5e-3)]
    ways = [Setting(8, 128, 24, 5e-3), Setting(8, 512, 6, 5e-3)]
    lora = [Setting(8, 256, 12, rate, lora_r=8) for rate in (5e-2, 2e-2)]
    again = [Setting(8, 256, 12, 5e-3)]
    high = [Setting(8, 512, 12, 1e-2), Setting(8, 256, 12, 1e-2), Setting(8, 512, 6, 1e-2)]
    tight_ways = [Setting(3, 128, 24, 5e-3), Setting(3, 512, 6, 5e-3), Setting(3, 512, 6, 1e-2)]
    tight_clip = [Setting(3, 256, 12, 5e-3, clip_norm) for clip_norm in (0.1, 10.0)]
    low = [Setting(8, 128, 24, 2.5e-3), Setting(3, 128, 24, 2.5e-3)]
    lora += [Setting(8, 256, 12, rate, lora_r=8) for rate in (5e-3, 1e-2)]
    many = [Setting(8, 128, 48, rate) for rate in (5e-3, 2.5e-3)]
    return [*twice, *rates, *clip_norms, *tight, *ways, *lora, *again, *high, *tight_ways, *tight_clip, *low, *many]


def curve() -> list[Setting]:
    """The best full training of the grid, at several values of epsilon: loss over epsilon."""
    return [Setting(epsilon, 512, 12, 5e-3) for epsilon in (1, 2, 4, 8)]
