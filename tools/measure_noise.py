"""The processor time of a step's noise, plain and secure, side by side: ``python tools/measure_noise.py``.

One thread, ten million float32 values by default. The two alternate, so that what else the machine does falls on both;
the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import dpft


def seconds(noise: dpft.GaussianNoise, values: torch.Tensor) -> float:
    """Processor seconds of one addition."""
    start = time.process_time()
    noise.add_(values, 1.0)
    return time.process_time() - start


def measure(count: int, rounds: int) -> tuple[float, float, float]:
    """Median nanoseconds for each value, plain and secure, and the median of the ratios of one round."""
    values = torch.zeros(count)
    plain, secure = dpft.GaussianNoise(), dpft.GaussianNoise(secure=True)
    seconds(plain, values), seconds(secure, values)  # the table is made, and buffers are touched
    pairs = [(seconds(plain, values), seconds(secure, values)) for _ in range(rounds)]
    first, second = (statistics.median(column) / count * 1e9 for column in zip(*pairs, strict=True))
    return first, second, statistics.median(b / a for a, b in pairs)


def main() -> None:
    """Print the three numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, secure, ratio = measure(options.values, options.rounds)
    print(f"plain {plain:.1f} ns a value, secure {secure:.1f} ns a value, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
