"""LoRA on a base that is quantised and frozen: exact, at the FLOPs and the memory of plain training.

bitsandbytes and torchao are not among the project's requirements, as they are large and most of their kernels are for
GPUs: where they are not installed, these tests are skipped.
"""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dpft
from tests import oracle, zoo
from tests.clipping.against_oracle import FLOAT32_LIMIT, OF_PLAIN
from tests.memory_meter import MemoryMeter
from tests.models.heads import own_losses
from tools.models import quantised
from tools.models.building import NotBuiltError

WITH_OUTLIERS = "int8, with outliers"
BASES = [name for name in quantised.QUANTISATIONS if name != WITH_OUTLIERS]
STRATEGIES = ("one_pass", "two_pass", "per_example", "auto")


def quantisation(base: str) -> Any:
    """A config of transformers; skips the test where the library is missing."""
    try:
        return quantised.quantisation(base)
    except NotBuiltError as error:
        pytest.skip(str(error))


def qlora(folder: Path, config: Any, checkpointing: bool = False, **sizes: Any) -> nn.Module:
    """A tiny Llama, saved, loaded quantised, prepared as PEFT has it, with factors of rank 16 in all linear layers."""
    peft = pytest.importorskip("peft")
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(
            hf.LlamaConfig(**zoo._sizes(**{"hidden_size": 64, "intermediate_size": 128, **sizes}))
        ).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora).train()


def one_at_a_time(model: nn.Module, batch: dict[str, Tensor]) -> oracle.PerExample:
    """As :func:`tests.oracle.oracle`, in the model's own precision: the kernels refuse float64."""
    parameters = oracle.trainable(model)
    losses, grads = [], []
    for i in range(oracle.size(batch)):
        (loss,) = own_losses(model, oracle.row(batch, i))
        found = torch.autograd.grad(loss, list(parameters.values()))
        losses.append(loss.detach().double())
        grads.append({name: g.double() for name, g in zip(parameters, found, strict=True)})
    return oracle.PerExample(torch.stack(losses), tuple(grads))


@pytest.mark.slow  # loads a model from disk each time
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("base", BASES)
def test_exact(base: str, checkpointing: bool, tmp_path: Path) -> None:
    model = qlora(tmp_path, quantisation(base), checkpointing)
    batch = zoo.token_batch(3, 9, seed=3)
    exact = one_at_a_time(model, batch)
    limit = float(exact.norms.median()) * 1.001
    for strategy in STRATEGIES:
        model.zero_grad()
        dpft.wrap(model, strategy=strategy, max_grad_norm=limit)  # type: ignore[arg-type]  # one of the literals
        model(**batch).loss.backward()
        error = oracle.relative_error(oracle.grads_of(model), exact.weighted_sum(exact.factors(limit)))
        assert error < FLOAT32_LIMIT
        found = dpft.stats(model)
        assert found.strategy == ("one_pass" if strategy == "auto" else strategy)
        torch.testing.assert_close(found.norms.double(), exact.norms, rtol=OF_PLAIN * 1e-6, atol=0)
        dpft.unwrap(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_flops_and_memory_of_a_step(checkpointing: bool, tmp_path: Path) -> None:
    """Of a 4-bit base with factors of rank 16, against the same step without privacy."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2000}
    model = qlora(tmp_path, quantisation("nf4"), checkpointing, **sizes, max_position_embeddings=512)
    ids = torch.randint(0, 2000, (4, 256), generator=torch.Generator().manual_seed(1))
    measured = {}
    for strategy in ("plain", "one_pass"):
        if strategy != "plain":
            dpft.wrap(model, strategy=strategy, loss_chunk=None)  # a loss in chunks would need less memory than plain
        for _ in range(2):  # of the first backwards some are checked
            model(input_ids=ids[:2, :8], labels=ids[:2, :8]).loss.backward()
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        gc.collect()
        before = [*model.parameters(), *model.buffers(), ids]
        with MemoryMeter(before) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        measured[strategy] = counter.get_total_flops(), meter.peak
    flops, peak = (measured["one_pass"][k] / measured["plain"][k] for k in (0, 1))
    print(f"{flops:.4f} x the FLOPs, {peak:.4f} x the memory")
    # a checkpoint recomputes less: a site has saved its tensors before its product
    assert 0.95 < flops <= 1.01, f"{flops:.4f} x"
    assert peak <= 1.02, f"{peak:.4f} x"


def with_outliers(threshold: float) -> nn.Module:
    """A layer that is called and set as bitsandbytes' is."""

    class Linear8bitLt(nn.Linear):
        state = type("MatmulLtState", (), {"threshold": threshold})

    frozen = Linear8bitLt(4, 4).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(4, 1))


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_outliers_of_the_batch_are_refused(strategy: Any) -> None:
    """LLM.int8(): which columns are in 16 bits depends on all rows."""
    with pytest.raises(dpft.UnsupportedModuleError, match=r"0: bitsandbytes.*llm_int8_threshold=6.0.*per_example"):
        dpft.wrap(with_outliers(6.0), strategy=strategy)
    dpft.wrap(with_outliers(0.0), strategy=strategy)


def test_outliers_of_the_batch_are_run_one_by_one() -> None:
    text = dpft.explain(dpft.wrap(with_outliers(6.0)), 3, 1)
    assert "per_example" in text and "llm_int8_threshold=0.0" in text


def test_the_outliers_of_bitsandbytes_are_found(tmp_path: Path) -> None:
    """The attribute that is read is the one that it has."""
    model = qlora(tmp_path, quantisation(WITH_OUTLIERS))
    with pytest.raises(dpft.UnsupportedModuleError, match=r"14 layers quantise .*layers\.0\.self_attn\.q_proj"):
        dpft.wrap(model, strategy="one_pass")
