"""--user-column: a user is one example. The clipped sum is that of the users' gradients, by the float64 oracle."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dpft
import llama_dp
from finetune.data.examples import make_collate
from finetune.data.labelled import make_label_collate
from finetune.data.loading import load_texts
from finetune.data.users import Users, group_users, mean_of_users, of_users, user_words
from finetune.private import Prepared
from finetune.recipe import Recipe
from tests.engines.launching import ROOT, launch, succeed
from tests.oracle import Float64

CONFIG = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
Record = tuple[str, list[int]]


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))


def some_records() -> list[Record]:
    """Five users with 1 to 7 records of 2 to 9 tokens, in a mixed order."""
    draw = random.Random(3)
    records = [
        (user, [draw.randrange(1, 61) for _ in range(draw.randint(2, 9))])
        for number, user in enumerate("abcde")
        for _ in range((1, 7, 2, 4, 3)[number])
    ]
    draw.shuffle(records)
    return records


def grouped(records: Sequence[Record], at_most: int = 3, seed: int = 0, fresh: bool = False) -> Users:
    data = Dataset.from_dict({"input_ids": [ids for _, ids in records]})
    return group_users(data, [user for user, _ in records], at_most, seed, fresh)


def rows_by_user(records: Sequence[Record], **how: int) -> dict[str, list[list[int]]]:
    users = grouped(records, **how)
    return {user: rows_of_user(users[i]) for i, user in enumerate(sorted({user for user, _ in records}))}


def rows_of_user(user: dict[str, Any]) -> list[list[int]]:
    return [record["input_ids"] for record in user["records"]]


def oracle_gradient(rows: list[list[int]]) -> list[Tensor]:
    """The gradient of one user in float64: records alone, the losses of all their tokens averaged by hand."""
    model = tiny().double()
    with Float64():
        losses = []
        for row in rows:
            chances = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            losses += [-chances[at, row[at + 1]] for at in range(len(row) - 1)]
        return list(torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters())))


def norm(gradient: Sequence[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in gradient]).norm())


def clipped_sum(users: Users, clip: float) -> tuple[list[Tensor], Tensor]:
    """What dpft makes of a logical batch of all the users: clipped sum and norms."""
    model = dpft.wrap(tiny(), max_grad_norm=clip)
    batch = of_users(make_collate(0))([users[i] for i in range(len(users))])
    prepared = Prepared(model, torch.optim.SGD(model.parameters()), None, Recipe().losses)
    prepared.loss({**batch, "example_weight": torch.ones(len(users))}).backward()
    return [p.grad.double() for p in model.parameters()], dpft.stats(model).norms.double()


def test_the_clipped_sum_is_that_of_the_users_gradients() -> None:
    users = grouped(some_records())
    gradients = [oracle_gradient(rows_of_user(users[i])) for i in range(len(users))]
    norms = [norm(gradient) for gradient in gradients]
    clip = sorted(norms)[2]  # some are clipped, some are not
    found, their_norms = clipped_sum(users, clip)
    torch.testing.assert_close(their_norms, torch.tensor(norms).double(), rtol=1e-5, atol=0)
    for at, part in enumerate(found):
        expected = sum(g[at] * min(1.0, clip / n) for g, n in zip(gradients, norms, strict=True))
        assert (part - expected).norm() <= 1e-5 * expected.norm()


def test_a_user_changes_the_sum_by_at_most_the_clip_norm() -> None:
    """Neighbouring datasets: all records of one user removed, of whom one has more records than are used."""
    records, clip = some_records(), 0.05
    whole, norms = clipped_sum(grouped(records), clip)
    assert (norms > clip).all()
    for user in "abcde":
        without, _ = clipped_sum(grouped([record for record in records if record[0] != user]), clip)
        change = norm([a - b for a, b in zip(whole, without, strict=True)])
        assert change == pytest.approx(clip, rel=1e-4)  # clipped, so that it is C: its records count once, together
    # the check can fail: as examples of their own the records of b change it by more
    each = [record for record in records if record[0] == "b"]
    alone, _ = clipped_sum(grouped([(str(i), ids) for i, (_, ids) in enumerate(each)]), clip)
    assert norm(alone) > 2 * clip


def test_nobody_else_decides_which_records_of_a_user_are_used() -> None:
    records = some_records()
    chosen = rows_by_user(records)
    assert [len(chosen[user]) for user in "abcde"] == [1, 3, 2, 3, 3]
    shuffled = random.Random(0).sample(records, len(records))
    assert rows_by_user(shuffled) == chosen
    for user in "abcde":
        others = {name: rows for name, rows in chosen.items() if name != user}
        assert rows_by_user([record for record in records if record[0] != user]) == others
        assert all(row in [ids for name, ids in records if name == user] for row in chosen[user])
    assert any(rows_by_user(records, seed=seed)["b"] != chosen["b"] for seed in range(1, 4))
    assert sorted(rows_by_user(records, at_most=99)["b"]) == sorted(ids for name, ids in records if name == "b")


def test_users_are_counted_and_canaries_are_users() -> None:
    users = grouped(some_records())
    assert users.owned.tolist() == [1, 7, 2, 4, 3] and users.most_tokens == 3 * 9
    assert "the one with most has 7 (41.2 %)" in users.summary("id")
    assert "5 (29.4 %) beyond --records-per-user 3 are not used" in users.summary("id")
    more = users.with_users([[{"input_ids": [1, 2, 3]}]])
    assert more.lengths[5] == 3 and more.lengths[:5] == [
        len(rows_of_user(users[i])) * max(map(len, rows_of_user(users[i]))) for i in range(5)
    ]
    assert len(more) == 6 and rows_of_user(more[5]) == [[1, 2, 3]] and more[0] == users[0]
    with pytest.raises(IndexError):
        more[6]


def test_records_drawn_afresh() -> None:
    """Of all of a user's records, at most K at a time; lengths, and what memory is planned for, are bounds."""
    records = some_records()
    once, afresh = grouped(records), grouped(records, fresh=True)
    assert afresh.owned.tolist() == once.owned.tolist() and afresh.most_tokens == once.most_tokens
    assert "are not used in a step" in afresh.summary("id")
    more = afresh.with_users([[{"input_ids": [1, 2, 3]}]])
    own = {user: sorted(ids for name, ids in records if name == user) for user in "abcde"}
    drawn: list[set[str]] = [set() for _ in "abcde"]
    for _ in range(60):
        for at, user in enumerate("abcde"):
            rows = rows_of_user(more[at])
            assert len(rows) == min(3, len(own[user])) and all(row in own[user] for row in rows)
            assert len(rows) * max(map(len, rows)) <= more.lengths[at] <= more.most_tokens
            drawn[at] |= {str(row) for row in rows}
    assert [len(rows) for rows in drawn] == [len({str(row) for row in own[user]}) for user in "abcde"]
    assert rows_of_user(more[5]) == [[1, 2, 3]]
    assert "used in a step, drawn afresh" in user_words("id", 3, fresh=True) and "step" not in user_words("id", 3)


def test_the_users_of_each_record_must_be_as_many_as_the_records() -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    for users in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="zip"):
            group_users(data, users, 2, 0)


def test_labels_of_tokens_and_of_records_go_with_them() -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7]], "labels": [[-100, 2, 3], [-100, 5], [6, 7]]})
    users = group_users(data, ["b", "a", "b"], 2, 0)
    batch = of_users(make_collate(0))([users[i] for i in range(2)])
    assert batch["example_ids"].tolist() == [0, 1, 1]
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        number = data["input_ids"][:].index([token for token in row if token])
        assert labels == [*data["labels"][number], *[-100] * (len(row) - len(data["labels"][number]))]
    kinds = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7]], "labels": [2, 1, 0]})
    users = group_users(kinds, ["b", "a", "b"], 2, 0)
    batch = of_users(make_label_collate(0))([users[i] for i in range(2)])
    expected = {(1, 2, 3): 2, (4, 5): 1, (6, 7): 0}
    rows = [tuple(token for token in row if token) for row in batch["input_ids"].tolist()]
    assert batch["labels"].tolist() == [expected[row] for row in rows] and rows[0] == (4, 5)
    means = mean_of_users(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 1]))
    assert means.tolist() == [1.0, 4.0]


def test_nobody_is_in_training_and_validation(tmp_path: Any) -> None:
    rows = [{"text": f"record {n}", "id": n % 40} for n in range(200)]
    data = Dataset.from_list(rows)
    data.to_json(str(tmp_path / "data.jsonl"))
    train, validation = load_texts(str(tmp_path / "data.jsonl"), user_column="id")
    assert len(train) + len(validation) == 200 and not set(train["id"]) & set(validation["id"])
    both = DatasetDict({"train": data.select(range(100)), "validation": data.select(range(100, 150))})
    extra = Dataset.from_list([{"text": "new", "id": 99}])
    both["validation"] = Dataset.from_list([*both["validation"], *extra])
    both.save_to_disk(str(tmp_path / "saved"))
    train, validation = load_texts(str(tmp_path / "saved"), user_column="id")
    assert len(train) == 100 and validation["id"][:] == [99]


def test_the_statement_names_the_user_as_unit() -> None:
    item = user_words("id", 8)
    privacy = dpft.PrivacyConfig(
        noise_multiplier=1.0, num_steps=5, expected_batch_size=4, target_delta=1e-3, item=item, max_grad_norm=1.0
    )
    text = dpft.privacy_statement_markdown(dpft.privacy_report(privacy.resolve(100), 5))
    assert f"| Privacy unit | {item} |" in text and f"in which one {item} is added or removed" in text


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options of a small run on 40 users with one to five records each."""
    rows = [{"text": f"Return record {n} of them", "who": n % 40} for n in range(160) if n % 40 % 5 <= n // 40 + 1]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", str(tmp_path / "data.jsonl"), "--user-column", "who", "--records-per-user", "3"]
    words += ["--num-steps", "2", "--expected-batch-size", "8", "--noise-multiplier", "1", "--target-delta", "1e-3"]
    return [*words, "--sample-tokens", "2", "--cpu-threads", "1", "--output-dir", str(tmp_path / "run")]


@pytest.mark.slow
def test_a_run_on_users(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Audited, beside the same without privacy; it goes on with the same users only."""
    assert llama_dp.main([*words, "--audit", "8", "--compare-nonprivate"]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    unit = user_words("who", 3)
    assert f"| Privacy unit | {unit} |" in card and f"in which one {unit} is added or removed" in card
    assert "one user is one example" in card and "one record is one example" not in card
    assert "are not used" not in card, "how many records are not used was computed from them"
    assert "beyond --records-per-user 3 are not used" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "canaries.json").read_text())["losses_before"]
    others = ["--audit", "8", "--records-per-user", "2", "--resume-from-checkpoint", "--num-steps", "4"]
    with pytest.raises(SystemExit):
        llama_dp.main([*words, *others])
    assert "no statement covers both" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft_dp", "classify_dp", "synthesize_dp"])
def test_users_in_the_other_recipes(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations, texts with labels and texts after headers, of 30 users with one to four each."""
    rows: list[dict[str, Any]] = [{"who": n % 30} for n in range(90) if n % 30 % 4 <= n // 30 + 1]
    for n, row in enumerate(rows):
        if recipe == "sft_dp":
            row |= {"prompt": f"Name a number after {n}.", "completion": f"It is {n + 1}."}
        else:
            row |= {"text": f"Return record {n} of them", "label": ("one", "two")[n % 2]}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", str(tmp_path / "data.jsonl"), "--user-column", "who", "--records-per-user", "3"]
    words += ["--num-steps", "2", "--expected-batch-size", "8", "--noise-multiplier", "1", "--target-delta", "1e-3"]
    words += ["--cpu-threads", "1", "--output-dir", str(tmp_path / "run"), "--checkpoint-every", "0"]
    words += ["--no-measures", "--generate", "4", "--condition-on", "label"] if recipe == "synthesize_dp" else []
    assert importlib.import_module(recipe).main(words) == 0
    assert "users by 'who'" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| Privacy unit | {user_words('who', 3)} |" in card and "each is protected, not all together" not in card
    with pytest.raises(SystemExit):
        importlib.import_module(recipe).main([*words, "--user-column", "nobody", "--output-dir", str(tmp_path / "no")])
    assert "--user-column 'nobody'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_users_on_two_ranks(words: list[str], tmp_path: Path) -> None:
    recipe = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
    told = succeed(launch("ddp", recipe, *words, "--records-drawn", "afresh", scratch=tmp_path, timeout=200))
    assert told.count("users by 'who'") == 1 and "validation loss after" in told
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| Privacy unit | {user_words('who', 3, fresh=True)} |" in card and "drawn anew in each step" in card


@pytest.mark.slow
def test_advice_compares_users_with_records(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    at = words.index("--noise-multiplier")
    assert llama_dp.main([*words[:at], *words[at + 2 :], "--target-epsilon", "8", "--advise"]) == 0
    told = capsys.readouterr().out
    assert "NOT FOR PUBLICATION" in told and "users sampled" in told and "better: " in told
