"""Isolation by value: every planted mixing is refused, nothing else is, and a training is the same with the check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpft
from tests import zoo
from tests.training import Training, tiny_llama

Hook = Callable[[nn.Module, Any, Any], Any]
REFUSED = "run alone and without its padding"


def hidden(change: Callable[[Tensor], Tensor]) -> Hook:
    """A forward hook that changes the hidden states ``[B, T, D]`` of a layer."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return hook


def keep_largest(h: Tensor) -> Tensor:
    """As routing with a capacity: half of the batch's tokens pass, the largest ones."""
    size = h.detach().norm(dim=-1)
    return h * (size >= size.flatten().median()).unsqueeze(-1)


def attend_across_rows(h: Tensor) -> Tensor:
    """Attention with the batch in place of the tokens, as where they were transposed by mistake."""
    rows = h.detach().transpose(0, 1)
    return h + torch.softmax(rows @ rows.mT, 2).matmul(rows).transpose(0, 1)


MIXINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached batch mean": lambda h: h - h.mean(0).detach(),
    "detached batch deviation": lambda h: h / (1 + h.detach().std(0)),
    "the row before": lambda h: h + 0.3 * h.roll(1, 0).detach(),
    "the order of the rows": lambda h: h * (1 + h.detach().norm(dim=(1, 2)).argsort().argsort().view(-1, 1, 1)),
    "capacity": keep_largest,
    "attention over the batch": attend_across_rows,
    "a convolution over padding": lambda h: h + 0.3 * h.roll(-2, 1),
    "a mean over padding": lambda h: h + h.mean(1, keepdim=True),
    "the padded length": lambda h: h * (1 + 0.1 * h.shape[1]),
    "packed rows": lambda h: h.flatten(0, 1).cumsum(0).view_as(h),
}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_through_detached_values_is_refused(mixing: str, dtype: torch.dtype) -> None:
    model = zoo.LLAMA.build().to(dtype)
    model.get_submodule("model.layers.0").register_forward_hook(hidden(MIXINGS[mixing]))
    # In bf16 only the one row that is changed most may be seen: 0.75^72 = 1e-9 is the chance that it is never drawn.
    assert refused(dpft.wrap(model, isolation="every_step"), zoo.token_batch(4, 9), times=72)


def test_the_check_by_gradients_does_not_see_it() -> None:
    """Without the check by values the detached mean is trained on: red if this ever stops to be a test of anything."""
    model = zoo.LLAMA.build()
    model.get_submodule("model.layers.0").register_forward_hook(hidden(MIXINGS["detached batch mean"]))
    dpft.wrap(model, isolation="off")
    model(**zoo.token_batch(4, 9)).loss.backward()


def test_mixing_inside_frozen_layers_is_refused() -> None:
    model = zoo.LLAMA.build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name or "lm_head" in name)
    model.get_submodule("model.layers.0").register_forward_hook(hidden(lambda h: h - h.mean(0)))
    dpft.wrap(model)
    with pytest.raises(dpft.ClippingError, match=REFUSED):
        model(**zoo.token_batch(4, 9))


def left_padded() -> dict[str, Tensor]:
    """Every row but the longest has padding in front of it."""
    batch = zoo.token_batch(6, 12, padding="left")
    batch["attention_mask"][1:, :3] = 0
    first = batch["attention_mask"].argmax(1)
    batch["labels"][torch.arange(12) <= first[:, None]] = -100  # nothing predicts the first token but padding
    return batch


def refused(model: nn.Module, batch: dict[str, Tensor], times: int = 24) -> bool:
    """Whether one of some forwards is: the row is random, and the longest has no padding.

    Where two of six rows show nothing, the chance that no other one is drawn is (1 / 3)^24 = 4e-12.
    """
    try:
        for _ in range(times):
            model(**batch)
    except dpft.ClippingError as error:
        assert REFUSED in str(error)
        return True
    return False


def test_left_padding_with_absolute_positions_is_refused() -> None:
    batch = left_padded()
    assert refused(dpft.wrap(zoo.GPT2.build(), isolation="every_step"), batch)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert not refused(dpft.wrap(zoo.GPT2.build(), isolation="every_step"), {**batch, "position_ids": positions})
    assert not refused(dpft.wrap(zoo.GPT2.build(), isolation="every_step"), zoo.token_batch(6, 12))
    assert not refused(dpft.wrap(zoo.LLAMA.build(), isolation="every_step"), batch)  # rotary: relative
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert refused(dpft.wrap(zoo.LLAMA.build(), isolation="every_step"), batch), "predicted by padding"


def test_labels_on_padding_are_refused() -> None:
    batch = zoo.token_batch(6, 12)
    batch["labels"] = batch["input_ids"].clone()
    assert refused(dpft.wrap(zoo.LLAMA.build(), isolation="every_step"), batch)


class Mixing(nn.Module):
    """A layer, and something of the other rows."""

    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(5, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + 0.01 * out.sum(0).detach() if self.mix else out


@pytest.mark.parametrize("mix", [False, True])
def test_outputs_are_compared_where_the_caller_has_the_loss(mix: bool) -> None:
    torch.manual_seed(0)
    model = dpft.wrap(Mixing(mix))
    x = torch.randn(6, 5)
    if mix:
        with pytest.raises(dpft.ClippingError, match=REFUSED):
            model(x)
    else:
        dpft.clipped_loss(model, model(x).square().sum(1)).backward()


def with_dropout() -> nn.Module:
    model = zoo.GPT2.build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


def test_dropout_raises_no_alarm_and_hides_no_mixing() -> None:
    model = dpft.wrap(with_dropout(), isolation="every_step")
    assert not refused(model, zoo.token_batch(4, 9), times=20)
    assert all(module.training for module in model.modules())
    model = with_dropout()
    model.get_submodule("transformer.h.0").register_forward_hook(hidden(MIXINGS["detached batch mean"]))
    assert refused(dpft.wrap(model, isolation="every_step"), zoo.token_batch(4, 9), times=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_is_the_same_with_the_check(checkpointing: bool) -> None:
    """Random numbers, gradients and what is counted: nothing shows that a row was run alone."""
    found = []
    for isolation in ("off", "every_step"):
        model: Any = with_dropout()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        dpft.wrap(model, isolation=isolation)  # type: ignore[arg-type]  # the two names above
        torch.manual_seed(3)
        for step in range(5):
            loss = model(**zoo.token_batch(4, 9, seed=step)).loss
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters()] + [loss.detach(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_is_due_at_powers_of_two_and_costs_one_row() -> None:
    model = zoo.LLAMA.build()
    rows: list[int] = []
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    dpft.wrap(model)
    for _ in range(9):
        model(**zoo.token_batch(4, 9)).loss.backward()
    checked = [step for step in range(1, 10) if step & (step - 1) == 0]
    assert rows == [size for step in range(1, 10) for size in ([4, 1] if step in checked else [4])]


def test_with_dropout_it_is_rarer() -> None:
    """There it runs the whole batch again, too; the first check of a model is never left out."""
    model = with_dropout()
    rows: list[int] = []
    model.get_submodule("transformer.h.0").register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    dpft.wrap(model)
    for step in range(20):
        model(**zoo.token_batch(4 if step else 1, 9)).loss.backward()
    checked = [2, 4, 16]  # of 2, 4, 8, 16: backward 1 has one row alone
    assert rows == [1] + [size for step in range(2, 21) for size in ([4, 4, 1] if step in checked else [4])]


@pytest.mark.parametrize("options", [{"isolation": "off"}, {"clipping": "none"}])
def test_where_it_is_not_needed(options: dict[str, Any]) -> None:
    model = zoo.LLAMA.build()
    calls: list[int] = []
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    dpft.wrap(model, **options)
    model(**zoo.token_batch(4, 9))
    assert calls == [4]


@pytest.mark.parametrize("mixing", MIXINGS)
def test_rows_that_run_one_by_one(mixing: str) -> None:
    """They cannot act on each other, but by the padding that the longest of them gives the others."""
    model = zoo.LLAMA.build()
    model.get_submodule("model.layers.0").register_forward_hook(hidden(MIXINGS[mixing]))
    dpft.wrap(model, strategy="per_example", isolation="every_step")
    padding = mixing in ("a convolution over padding", "a mean over padding", "the padded length")
    if mixing not in ("detached batch deviation", "capacity"):  # of one row there is none; over its padding, perhaps
        assert refused(model, zoo.token_batch(4, 9), times=48 if padding else 4) == padding


def test_rows_that_run_one_by_one_change_no_buffer() -> None:
    model = zoo.LLAMA.build()
    model.register_buffer("seen", torch.zeros(()))
    model.get_submodule("model.layers.0").register_forward_hook(lambda module, args, out: model.seen.add_(1) and None)
    with pytest.raises(dpft.ClippingError, match="changed the buffers"):
        dpft.wrap(model, strategy="per_example")(**zoo.token_batch(4, 9))


def test_one_row_needs_none() -> None:
    model = dpft.wrap(zoo.LLAMA.build(), isolation="every_step")
    calls: list[int] = []
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda module, args: calls.append(1))
    model(**zoo.token_batch(1, 9))
    assert calls == [1]


def test_unknown_value_is_refused() -> None:
    with pytest.raises(ValueError, match="isolation is 'sometimes'"):
        dpft.wrap(zoo.LLAMA.build(), isolation="sometimes")  # type: ignore[arg-type]  # what is refused


def test_prepare_refuses_before_the_release_and_reports_off(tmp_path: Path) -> None:
    model = tiny_llama()
    model.get_submodule("model.layers.0").register_forward_hook(hidden(MIXINGS["detached batch mean"]))
    training = Training(tmp_path / "a.jsonl", model=copy.deepcopy(model), max_physical_batch_size=6)
    with pytest.raises(dpft.ClippingError, match=REFUSED):
        training.train()
    assert training.run.steps == 0
    assert not any("run a row alone" in line or "runs a row alone" in line for line in report(training))
    off = Training(tmp_path / "b.jsonl", model=model, max_physical_batch_size=6, isolation="off")
    assert any("isolation='off'" in line for line in report(off))


def report(training: Training) -> list[str]:
    assumptions: list[str] = training.loader.privacy.report()["assumptions"]
    return assumptions


@pytest.mark.parametrize("entry", zoo.ZOO, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_false_alarm(entry: zoo.Entry, dtype: torch.dtype) -> None:
    """A few batches of every model; docs/design.md has the largest difference in a thousand."""
    model = dpft.wrap(entry.build().to(dtype), isolation="every_step")
    for seed in range(5):
        batch = entry.batch(2 + seed, 5 + 3 * seed, seed=seed)
        batch = {k: v.to(dtype) if v.is_floating_point() and k != "labels" else v for k, v in batch.items()}
        if entry.causal:
            model(**batch)
        else:
            entry.losses(model, batch)
