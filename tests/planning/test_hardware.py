"""Times: a roofline over counted operations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dpft.planning.hardware import HARDWARE, Hardware, measure
from dpft.planning.step_meter import Operation

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
SLOW = Hardware("slow", 2**30, {FP32: 100.0, BF16: 200.0, FP64: 50.0}, 0.5, 10.0, 1.0, False, "made up")


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (Operation("mm", FP32, 1000, 20), 10),
        (Operation("mm", BF16, 1000, 20), 5),
        (Operation("mm", FP64, 1000, 20), 20),
        (Operation("mm", FP32, 1000, 2000), 200),  # bound by the bandwidth
        (Operation("add", torch.int64, 0, 50), 5),
        (Operation("_scaled_dot_product_flash_attention", FP32, 1000, 20), 20),
        (Operation("_scaled_dot_product_flash_attention", FP32, 1000, 20, causal=True), 10),
    ],
)
def test_an_operation_takes_its_work_or_its_bytes(operation: Operation, seconds: float) -> None:
    assert SLOW.seconds(Counter({operation: 3})) == pytest.approx(3 * (seconds + 1.0))


def test_an_asynchronous_device_hides_the_hosts_time_behind_its_own() -> None:
    fast = Hardware("gpu", 2**30, {FP32: 100.0}, 0.5, 10.0, 1.0, True, "made up")
    assert fast.seconds(Counter({Operation("mm", FP32, 1000, 0): 2})) == pytest.approx(20)
    assert fast.seconds(Counter({Operation("mm", FP32, 10, 0): 7})) == pytest.approx(7)


def test_published_hardware_stays_below_its_data_sheet() -> None:
    for machine in HARDWARE.values():
        assert machine.asynchronous and "data sheet" in machine.source
        assert machine.rates[FP64] <= machine.rates[FP32] < machine.rates[BF16] < 1e15
        assert 0 < machine.attention <= 1 and machine.memory >= 80e9


def test_measures_the_device_at_hand_once_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    here = measure(torch.device("cpu"))
    assert here.source == "measured here" and not here.asynchronous and here.memory > 2**20
    assert min(here.rates.values()) > 1e6 and here.bandwidth > 1e6 and 0 < here.overhead < 1
    assert measure(torch.device("cpu")) is here
    assert torch.equal(torch.get_rng_state(), state)
