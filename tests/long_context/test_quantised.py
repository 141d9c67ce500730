"""LoRA on a quantised base: the gradients are those without tiles, and without what else long contexts do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dpft
from tests import oracle, zoo
from tests.long_context.setups import blocks_of, long
from tests.models.test_quantised import qlora, quantisation


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_qlora(tmp_path: Path, strategy: str) -> None:
    config, batch = quantisation("nf4"), zoo.token_batch(examples=3)

    def private(tiled: bool) -> nn.Module:
        model = qlora(tmp_path, config).train()
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and p.is_floating_point())
        model = long(model) if tiled else model
        dpft.wrap(model, max_grad_norm=0.5, strategy=strategy)
        model(**batch).loss.backward()
        return model

    plain, tiled = private(False), private(True)
    assert any("MLP" in type(block.owner).__name__ for block in blocks_of(tiled))
    torch.testing.assert_close(dpft.stats(tiled).norms, dpft.stats(plain).norms, rtol=1e-5, atol=0.0)
    found, expected = oracle.grads_of(tiled), oracle.grads_of(plain)
    assert oracle.relative_error(found, expected) < 1e-5
