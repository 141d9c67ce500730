"""What is known of DeepSpeed's insides is verified before training: a DeepSpeed that shards otherwise is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpft import EngineError
from dpft.engines.ranks import Ranks
from dpft.engines.zero_layout import innermost, read_layout

ALONE = Ranks(torch.device("cpu"))


def zero_2(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, nn.Parameter]]:
    """An object like ZeRO-2's optimiser of one rank, with two parameters and padding."""
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 2).to(dtype)), "b": nn.Parameter(torch.randn(5).to(dtype))}
    flat = torch.cat([*(p.detach().float().flatten() for p in parameters.values()), torch.zeros(1)])
    start = 0
    for p in parameters.values():
        p._hp_mapping = SimpleNamespace(  # type: ignore[attr-defined]  # as DeepSpeed does
            lp_fragment_address=SimpleNamespace(start=0, numel=p.numel()),
            hp_fragment_address=SimpleNamespace(start=start, numel=p.numel()),
            param_group_index=0,
        )
        start += p.numel()
    groups = [list(parameters.values())]
    return SimpleNamespace(single_partition_of_fp32_groups=[flat], bit16_groups=groups), parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_read(dtype: torch.dtype) -> None:
    zero, parameters = zero_2(dtype)
    layout = read_layout(zero, 2, parameters, ALONE)
    assert [(f.start, f.numel, f.offset) for name in "ab" for f in layout.fragments[name]] == [(0, 6, 0), (0, 5, 6)]


def test_elements_in_another_place_are_noticed() -> None:
    zero, parameters = zero_2()
    zero.single_partition_of_fp32_groups[0] = zero.single_partition_of_fp32_groups[0].roll(1)
    with pytest.raises(EngineError, match="not where dpft looks"):
        read_layout(zero, 2, parameters, ALONE)


def test_missing_elements_are_noticed() -> None:
    zero, parameters = zero_2()
    parameters["b"]._hp_mapping.lp_fragment_address.numel = 4  # type: ignore[attr-defined]  # as DeepSpeed does
    with pytest.raises(EngineError, match="each once"):
        read_layout(zero, 2, parameters, ALONE)


def test_master_weights_in_bf16_are_refused() -> None:
    zero, parameters = zero_2()
    flats = zero.single_partition_of_fp32_groups
    flats[0] = flats[0].bfloat16()
    with pytest.raises(EngineError, match="bf16_master_weights_and_grads"):
        read_layout(zero, 2, parameters, ALONE)


def test_a_deepspeed_with_other_insides_is_refused() -> None:
    zero, parameters = zero_2()
    del parameters["a"]._hp_mapping
    with pytest.raises(EngineError, match=r"deepspeed 0\.19"):
        read_layout(zero, 2, parameters, ALONE)


def test_a_parameter_that_the_optimiser_was_not_given_is_named() -> None:
    zero, parameters = zero_2()
    zero.bit16_groups = [[parameters["a"]]]
    with pytest.raises(EngineError, match=r"\['b'\] of 1 trainable parameters"):
        read_layout(zero, 2, parameters, ALONE)


def test_one_innermost_optimiser_is_expected() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert innermost(SimpleNamespace(optimizer=inner)) is inner
    for wrong in (SimpleNamespace(optimizer=object()), SimpleNamespace(optimizer=inner, backup_optimizer=inner)):
        with pytest.raises(EngineError, match="expected one torch"):
            innermost(wrong)
