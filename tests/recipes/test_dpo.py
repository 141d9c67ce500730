"""preference_dp.py: each pair has TRL's loss of it alone, and its gradient over both rows is clipped as one."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dpft
from finetune.data.examples import make_collate
from finetune.data.preferences import PairCollate
from finetune.dpo import PreferenceLoss, completion_logps, measures, pair_logps, pair_losses, without_dropout
from tests.oracle import grads_of, oracle, plain_error, relative_error

CONFIG = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))


def pairs_of(*lengths: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Pairs with so many tokens of prompt, chosen and rejected completion."""
    draws = torch.Generator().manual_seed(1)
    made = []
    for place, (prompt, chosen, rejected) in enumerate(lengths):
        ids = torch.randint(1, 61, (prompt + chosen + rejected,), generator=draws).tolist()
        rows = ids[: prompt + chosen] + ids[:prompt] + ids[prompt + chosen :]
        made.append(
            {"input_ids": rows, "chosen_tokens": prompt + chosen, "prompt_tokens": prompt, "place": place},
        )
    return made


PAIRS = pairs_of((3, 5, 2), (1, 9, 9), (6, 1, 4), (2, 3, 7), (4, 4, 4))


def collator(model: Any, pairs: list[dict[str, Any]] = PAIRS) -> PairCollate:
    collate = PairCollate(make_collate(0))
    collate.reference, _ = pair_logps(model, pairs, collate)
    return collate


# Losses


def trl_loss(logits: Tensor, ids: Tensor, completion: Tensor, reference: Tensor, **settings: Any) -> float:
    """TRL's own ``DPOTrainer._compute_loss`` of rows, chosen ones first, with these logits."""
    trl: Any = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    nothing = torch.zeros_like(log_p)
    out = SimpleNamespace(
        log_probs=log_p * completion[:, 1:], is_top1=nothing.bool(), entropy=nothing, mean_logits=nothing
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    chosen, rejected = reference.T
    trainer: Any = SimpleNamespace(
        model=nn.Identity(),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return float(trl.DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False))


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (PreferenceLoss("sigmoid", 0.1), {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1}),
        (PreferenceLoss("ipo", 0.3), {"loss_types": ["ipo"], "loss_weights": [1.0], "beta": 0.3}),
        (
            PreferenceLoss("sigmoid", 0.2, sft_weight=0.7),
            {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.2},
        ),
        (
            PreferenceLoss("ipo", 0.2, sft_weight=0.7),
            {"loss_types": ["ipo", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.2},
        ),
    ],
)
def test_each_pairs_loss_is_trls_of_it_alone(loss: PreferenceLoss, settings: dict[str, Any]) -> None:
    draws = torch.Generator().manual_seed(0)
    reference = torch.randn(len(PAIRS), 2, generator=draws) * 5 - 20
    collate = PairCollate(make_collate(0))
    collate.reference = reference
    batch = collate(PAIRS)
    logits = torch.randn(*batch["input_ids"].shape, 61, generator=draws)
    found = pair_losses(lambda **_: SimpleNamespace(logits=logits), batch, loss)
    completion = (batch["labels"] != -100).long()
    expected = [
        trl_loss(logits[two], batch["input_ids"][two], completion[two], reference[i : i + 1], **settings)
        for i, two in ((i, slice(2 * i, 2 * i + 2)) for i in range(len(PAIRS)))
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_label_smoothing_is_the_mean_over_both_ways_round() -> None:
    logps, reference = torch.tensor([[-10.0, -13.0]]).double(), torch.tensor([[-11.0, -12.0]]).double()
    x = 0.5 * ((-10 + 11) - (-13 + 12))  # eq. 7 of the paper, by hand
    right, wrong = math.log1p(math.exp(-x)), math.log1p(math.exp(x))
    found = PreferenceLoss("sigmoid", 0.5, label_smoothing=0.2)(logps, reference, torch.tensor([[3, 4]]))
    assert found.item() == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-12)


def test_log_probabilities_are_of_the_completion() -> None:
    logits = torch.randn(2, 4, 61, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 7, 9], [-100, 3, -100, -100]])
    sums, tokens = completion_logps(logits, labels)
    chances = logits.log_softmax(-1)
    assert sums[0].item() == pytest.approx((chances[0, 1, 7] + chances[0, 2, 9]).item(), rel=1e-6)
    assert sums[1].item() == pytest.approx(chances[1, 0, 3].item(), rel=1e-6)
    assert tokens.tolist() == [2, 1]


# Privacy


def batch_of_units(collate: PairCollate, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as the oracle takes it: the first dimension is the pair."""
    batch = collate(pairs)
    return {name: t.view(len(pairs), 2, *t.shape[1:]) for name, t in batch.items() if name != "example_ids"}


def by_hand(loss: PreferenceLoss) -> Any:
    """The losses of pairs, each from a forward of its own, by the papers' formulas, without the code under test."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        found = []
        for i in range(len(batch["labels"])):
            sums, counts = [], []
            for side in range(2):
                ids, labels = batch["input_ids"][i, side], batch["labels"][i, side]
                mask = batch["attention_mask"][i, side]
                chances = model(input_ids=ids[None], attention_mask=mask[None]).logits[0].float().log_softmax(-1)
                own = [chances[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
                sums.append(torch.stack(own).sum() - batch["reference"][i, side])
                counts.append(len(own))
            nll = -(sums[0] + batch["reference"][i, 0]) / counts[0]
            if loss.kind == "ipo":
                of_pair = (sums[0] / counts[0] - sums[1] / counts[1] - 0.5 / loss.beta) ** 2
            else:
                of_pair = torch.log1p(torch.exp(-loss.beta * (sums[0] - sums[1])))
            found.append(of_pair + loss.sft_weight * nll)
        return torch.stack(found)

    return losses


KINDS = [PreferenceLoss("sigmoid", 0.5), PreferenceLoss("ipo", 0.2, sft_weight=0.3)]


@pytest.mark.parametrize(("loss", "strategy"), list(zip(KINDS, ("one_pass", "two_pass"), strict=True)))
def test_clipped_sum_of_pairs_is_the_oracles(loss: PreferenceLoss, strategy: Any) -> None:
    model = tiny(3)
    collate = collator(tiny())  # another model's reference: margins are not 0
    units = batch_of_units(collate, PAIRS)
    exact = oracle(model, units, by_hand(loss))
    clip = float(exact.norms.median())  # some pairs are clipped, some are not
    factors = exact.factors(clip)
    allowed = 2 * plain_error(model, units, exact, by_hand(loss), factors)
    wrapped = dpft.wrap(model, max_grad_norm=clip, strategy=strategy)
    dpft.clipped_loss(wrapped, pair_losses(wrapped, collate(PAIRS), loss)).backward()
    torch.testing.assert_close(dpft.stats(wrapped).norms.double(), exact.norms, rtol=1e-5, atol=0)
    assert relative_error(grads_of(wrapped), exact.clipped_sum(clip)) <= allowed


@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: loss.kind)
def test_one_pair_changes_the_clipped_sum_by_its_clip_norm_at_most(loss: PreferenceLoss) -> None:
    """Also where the pair that goes is the longest, on which the padding of the others depends."""
    clip = 1e-2  # below all norms, so that each pair changes the sum by just that
    collate = collator(tiny())

    def clipped_sum(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        model = dpft.wrap(tiny(3), max_grad_norm=clip)
        dpft.clipped_loss(model, pair_losses(model, collate(pairs), loss)).backward()
        assert bool((dpft.stats(model).norms > clip).all())
        return grads_of(model)

    whole = clipped_sum(PAIRS)
    for gone in range(len(PAIRS)):
        rest = clipped_sum(PAIRS[:gone] + PAIRS[gone + 1 :])
        changed = math.sqrt(sum((whole[name] - rest[name]).double().square().sum().item() for name in whole))
        assert changed == pytest.approx(clip, rel=1e-4)


# The start model, the measures


def test_log_probabilities_of_a_pair_do_not_depend_on_the_others_or_the_ranks(monkeypatch: Any) -> None:
    """Every rank runs as many forwards, and each pair is computed by one of them."""
    monkeypatch.setattr("finetune.dpo.SORTED_AT_ONCE", 4)
    monkeypatch.setattr("finetune.evaluation.batches_of.__defaults__", (30,))
    sent: list[Any] = []
    # one rank after the other, each of which is given back what it sends
    monkeypatch.setattr("finetune.evaluation.gather_object", lambda found: sent.extend(found) or found)
    model, collate = tiny().train(), PairCollate(make_collate(0))
    whole, tokens = pair_logps(model, PAIRS, collate)
    assert tokens.tolist() == [[5, 2], [9, 9], [1, 4], [3, 7], [4, 4]] and model.training
    for pair in PAIRS:
        alone, _ = pair_logps(model, [{**pair, "place": 0}], collate)
        torch.testing.assert_close(alone[0], whole[pair["place"]], rtol=1e-5, atol=1e-5)
    forwards = []
    for rank in range(3):
        counted = tiny()
        calls: list[None] = []
        counted.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        accelerator: Any = SimpleNamespace(process_index=rank, num_processes=3, device=torch.device("cpu"))
        pair_logps(counted, PAIRS, collate, accelerator)
        forwards.append(len(calls))
    assert len(set(forwards)) == 1 and forwards[0] < 5
    assert sorted(place for place, _ in sent) == list(range(len(PAIRS)))
    found = torch.tensor([[side[0] for side in sides] for _, sides in sorted(sent)])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_measures_of_the_start_model_and_of_another() -> None:
    start, other, loss = tiny(), tiny(3), PreferenceLoss("sigmoid", 0.5)
    collate = collator(start)
    before = measures(start, PAIRS, collate, loss)
    assert before["loss"] == pytest.approx(math.log(2)) and (before["accuracy"], before["margin"]) == (0.5, 0.0)
    reference, (logps, _) = collate.reference, pair_logps(other, PAIRS, collate)
    assert reference is not None
    margins = [(logps[i, 0] - reference[i, 0] - logps[i, 1] + reference[i, 1]).item() for i in range(len(PAIRS))]
    after = measures(other, PAIRS, collate, loss)
    assert after["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 5)
    assert after["margin"] == pytest.approx(0.5 * sum(margins) / 5, rel=1e-4)
    assert after["likelier"] == pytest.approx(sum(bool(a > b) for a, b in logps) / 5)
    assert after["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.5 * m)) for m in margins) / 5, rel=1e-4)


def test_dropout_is_off() -> None:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attention_dropout=0.5, attn_implementation="eager"))
    ids = torch.arange(9)[None]
    assert not torch.equal(model.train()(ids).logits, model(ids).logits), "the test needs dropout"
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
