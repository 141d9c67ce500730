"""tools/common/meter.py: FLOPs of attention whose keys and values have fewer heads, and of grouped convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tools.common import meter
from tools.common.meter import Meter


def attention_flops(kv_heads: int) -> int:
    """Of forward and backward at B = 2, 4 heads of queries, T = 32, D = 16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, heads, 32, 16), generator=generator, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    )
    with Meter([query, key, value]) as counted:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out.sum().backward()
    return counted.flops


def test_grouped_heads_count_as_often_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by formulas that want as many heads of all three, as those of torch 2.11 do."""
    seen = []

    def strict(formula: Any) -> Any:
        def count(*shapes: Any) -> int:
            seen.append({shape[1] for shape in shapes})
            return int(formula(*shapes))

        return count

    for name in ("sdpa_flop_count", "sdpa_backward_flop_count"):
        monkeypatch.setattr(meter, name, strict(getattr(meter, name)))
    product = 2 * 2 * 4 * 32 * 32 * 16
    assert attention_flops(2) == attention_flops(4) == (2 + 5) * product
    assert seen == [{4}] * 4


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_convolution_costs_as_much_for_each_gradient_as_forward(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(8, 8, 4, groups=groups)
    x = torch.randn(2, 8, 32, requires_grad=True)
    with Meter([]) as forward:
        out = layer(x)
    assert forward.flops == 2 * 2 * (32 if transposed else 29) * 4 * 8 * 8 // groups
    with Meter([]) as backward:
        out.sum().backward()
    assert backward.flops == 2 * forward.flops
