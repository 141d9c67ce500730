"""Synthetic data: conditions, generation, checks, measures, the data card; the recipe from end to end."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import synthesize_dp
from finetune.data.corpora import TROUBLES
from finetune.data.examples import make_collate
from finetune.data.labelled import ENCODER
from finetune.options import BASE_MODEL
from finetune.synthetic import records
from finetune.synthetic.card import Made, card, write
from finetune.synthetic.checks import Rules, check, first_of_similar, valid
from finetune.synthetic.conditions import (
    Conditions,
    conditions_of,
    parse_columns,
    parse_values,
    parse_weights,
    tokenise_conditioned,
    without_prompt_loss,
)
from finetune.synthetic.downstream import Classifier, Labelled
from finetune.synthetic.generation import Sampling, generate
from finetune.synthetic.measures import (
    clusters,
    distance,
    embed,
    frontier_area,
    lengths,
    longest_runs,
    overlap,
    total_variation,
)
from tests.engines.launching import ROOT, launch, succeed

TWO = Conditions({"label": ("a", "b"), "kind": ("x", "y", "other")})
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def sentence(draw: random.Random, words: int = 30) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


# --- conditions


def test_the_header_names_the_values_and_what_is_not_public_is_other_or_refused() -> None:
    assert TWO.header({"label": "b", "kind": "x", "text": "not read"}) == "label: b | kind: x\n"
    assert TWO.header({"label": "b", "kind": "secret"}) == "label: b | kind: other\n"
    with pytest.raises(ValueError, match="is not among the 2 public ones") as refused:
        TWO.header({"label": "secret", "kind": "x"})
    assert "secret" not in str(refused.value)  # a private value


def test_columns_that_tell_records_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="10,100 combinations"):
        Conditions({"name": tuple(map(str, range(101))), "day": tuple(map(str, range(100)))})


@pytest.mark.parametrize("values", [(), ("a", "a"), ("a | kind: b",), ("a\nb",), ("a\u2028b",), (" ",)])
def test_a_value_that_makes_headers_ambiguous_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="column 'label'"):
        Conditions({"label": values})


def test_counts_follow_weights_and_add_up() -> None:
    assert TWO.counts(6) == [1] * 6
    assert TWO.counts(8) == [2, 2, 1, 1, 1, 1]
    one = Conditions({"label": ("a", "b", "c")})
    assert one.counts(10, {"a": 3, "b": 1, "c": 0}) == [8, 2, 0]  # 7.5 and 2.5: of equal remainders the first
    assert TWO.counts(8, {"a": 3, "b": 1}) == [2, 2, 2, 1, 1, 0]
    assert all(sum(one.counts(n, {"a": 0.2, "b": 0.7, "c": 0.1})) == n for n in range(40))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "1 of the 2 values"),
        ({"a": 0.0, "b": 0.0}, "one above 0"),
        ({"z": 1.0}, "a value of 0 columns"),
        ({"a": -1.0, "b": 1.0}, "at least 0"),
    ],
)
def test_weights_that_are_incomplete_or_of_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TWO.counts(10, weights)


def test_words_of_the_command_line() -> None:
    assert parse_columns("label, kind") == ("label", "kind")
    assert parse_values("a, b", ["label"]) == {"label": ("a", "b")}
    assert parse_values("kind=x;label=a,b", ["label", "kind"]) == {"label": ("a", "b"), "kind": ("x",)}
    assert parse_values('{"label": ["one, two", 3]}', ["label"]) == {"label": ("one, two", "3")}
    assert parse_weights("a=3,b=1") == {"a": 3.0, "b": 1.0} and parse_weights(None) is None
    for words in ("", "label,label"):
        with pytest.raises(ValueError, match="--condition-on"):
            parse_columns(words)
    for words in ('{"label": ', '{"label": "a"}'):
        with pytest.raises(ValueError, match="--values"):
            parse_values(words, ["label"])
    with pytest.raises(ValueError, match="of each of those"):
        parse_values("label=a", ["label", "kind"])
    with pytest.raises(ValueError, match="no value and number"):
        parse_weights("a:3")


def test_values_taken_from_the_data_come_with_a_warning() -> None:
    data = Dataset.from_dict({"text": ["t"] * 3, "label": [2, 1, 2]})
    found, warning = conditions_of([data], ["label"], None)
    assert found.values == {"label": ("1", "2")} and "becomes public" in warning
    found, warning = conditions_of([data], ["label"], "1,2,3")
    assert found.values == {"label": ("1", "2", "3")} and not warning
    with pytest.raises(ValueError, match="the data has the columns text, label"):
        conditions_of([data], ["folder"], None)


def test_the_loss_is_of_the_text_and_the_header_is_what_generation_begins_with() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    data = Dataset.from_dict({"text": ["Return the value.", "word " * 90], "label": ["a", "b"], "kind": ["x", "y"]})
    examples = tokenise_conditioned(data, TWO, tokenizer, 40, "text")
    batch = without_prompt_loss(make_collate(0))([examples[0], examples[1]])
    for i, row in enumerate(data):
        head = tokenizer(TWO.header(row))["input_ids"]
        assert batch["input_ids"][i, : len(head)].tolist() == head
        labels = batch["labels"][i]
        assert (labels[: len(head)] == -100).all()
        learnt = labels[labels != -100].tolist()
        assert learnt == examples[i]["input_ids"][len(head) :]
        assert tokenizer.decode(learnt, skip_special_tokens=True) == row["text"][: len(tokenizer.decode(learnt))] or i
    assert examples[0]["input_ids"][-1] == tokenizer.eos_token_id and len(examples[1]["input_ids"]) == 40
    with pytest.raises(ValueError, match="a header has"):
        tokenise_conditioned(data, TWO, tokenizer, 8, "text")


# --- generation


def test_texts_follow_from_the_seed_and_not_from_the_number_of_ranks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    headers = ["label: a\n"] * 3 + ["label: a longer value\n"] * 4
    sampling = Sampling(max_new_tokens=6, batch_size=2, seed=3)
    before = torch.random.get_rng_state()
    alone = generate(model, tokenizer, headers, sampling)
    assert torch.equal(before, torch.random.get_rng_state())
    shares = [generate(model, tokenizer, headers, sampling, rank, 2) for rank in range(2)]
    assert all(shares) and sorted(shares[0] + shares[1], key=lambda text: text.position) == alone
    assert [text.position for text in alone] == list(range(7)) and not any("label" in text.text for text in alone)
    assert len({text.text for text in alone}) == 7  # batches of the same headers differ
    model.generation_config.repetition_penalty = 9.0  # a setting of the model's own, which the card would not name
    assert generate(model, tokenizer, headers, sampling) == alone and model.generation_config.repetition_penalty == 9
    other = generate(model, tokenizer, headers, dataclasses.replace(sampling, seed=4))
    assert [text.text for text in other] != [text.text for text in alone]


def test_padding_on_the_left_changes_no_text() -> None:
    """A short header in a batch with a long one is continued as it is alone."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    cold = Sampling(temperature=1e-4, max_new_tokens=8, batch_size=2)
    (alone,) = generate(model, tokenizer, ["label: a\n"], cold)
    both = generate(model, tokenizer, ["label: a\n", "label: quite a long value, of many tokens\n"], cold)
    assert both[0].text == alone.text


# --- checks


def test_copies_and_formats_are_rejected_and_counted() -> None:
    draw = random.Random(0)
    first, second = sentence(draw), sentence(draw)
    near = first.replace("alpha", "omega", 1)
    texts = [
        first,
        second,
        f"  {first.upper()}\n",
        near,
        "no",
        f"{second} again\nlabel: a",
        f"{second}\ufffd",
        "\x00" * 9,
    ]
    kept, rejected = check(texts, Rules(("label",), min_chars=5))
    assert kept == [0, 1]
    assert rejected == {
        "too short": 1,
        "repeats the header": 1,
        "no valid text": 2,
        "a copy of another one": 1,
        "nearly a copy of another one": 1,
    }
    assert sum(rejected.values()) + len(kept) == len(texts)
    kept, _ = check(texts, Rules(("label",), min_chars=5, near=1.0))
    assert kept == [0, 1, 3]


def test_a_header_is_found_where_it_is_repeated_and_only_there() -> None:
    rules = Rules(("label", "kind"), near=1.0)
    assert check(["A label: it names"], rules)[0] == [0]
    for text in ("label: a\nText", "text\nlabel: b", "words | kind: x"):
        assert check([text], rules)[1] == {"repeats the header": 1}


def test_json_patterns_and_lengths() -> None:
    texts = ['{"a": 1}', '{"a": 1', '{"b": 12345678}']
    assert check(texts, Rules(("label",), form="json"))[0] == [0, 2]
    assert check(texts, Rules(("label",), form="json", must_match='"b"', max_chars=20))[0] == [2]
    assert check(texts, Rules(("label",), max_chars=8))[1] == {"too long": 1}
    for wrong in ({"must_match": "("}, {"near": 0.0}, {"min_chars": 9, "max_chars": 3}):
        with pytest.raises(ValueError, match="--"):
            Rules(("label",), **wrong)
    assert valid("tab\tline\nend") and not valid("bell\a")


def test_minhash_finds_what_all_pairs_find() -> None:
    """Against the comparison of all pairs, on texts around the threshold."""
    draw, texts = random.Random(1), []
    for _ in range(30):
        base = sentence(draw, 40).split()
        texts += [" ".join("changed" if draw.random() < share else word for word in base) for share in (0, 0.02, 0.1)]

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}

    kept: list[int] = []
    for i, text in enumerate(texts):
        one = shingles(text)
        if not any(len(one & shingles(texts[j])) / len(one | shingles(texts[j])) >= 0.8 for j in kept):
            kept.append(i)
    assert first_of_similar(texts, 0.8) == kept and 30 < len(kept) < 90


# --- measures


def test_a_planted_copy_is_found_to_the_word() -> None:
    draw = random.Random(2)
    private = [sentence(draw) for _ in range(40)]
    fresh = [" ".join(f"word{draw.randrange(9999)}" for _ in range(30)) for _ in range(20)]
    planted = [*fresh[:-1], "before " + " ".join(private[7].split()[5:22]).upper() + " after"]
    runs = longest_runs(planted, private)
    assert runs[-1] == 17 and max(runs[:-1]) == 0
    assert overlap(planted, private) == {
        "median": 0.0,
        "0.95 quantile": pytest.approx(float(np.quantile(runs, 0.95))),
        "longest": 17.0,
        "share with 13 words in a row": 1 / 20,
    }
    assert longest_runs([private[3]], private) == [30]
    # a run does not go on into the next record
    assert longest_runs(["a b c d"], ["x a b", "c d x"]) == [2]
    assert longest_runs(["", "a"], [""]) == [0, 0]


def test_longest_runs_are_those_of_all_pairs() -> None:
    draw = random.Random(3)
    texts, corpus = ([sentence(draw, draw.randint(0, 25)) for _ in range(15)] for _ in range(2))

    def brute(text: str) -> int:
        words, best = text.split(), 0
        for other in (some.split() for some in corpus):
            for i in range(len(words)):
                for j in range(len(other)):
                    n = 0
                    while i + n < len(words) and j + n < len(other) and words[i + n] == other[j + n]:
                        n += 1
                    best = max(best, n)
        return best

    assert longest_runs(texts, corpus) == [brute(text) for text in texts]


def test_distributions() -> None:
    assert total_variation("aab", "aab") == 0 and total_variation("aa", "bb") == 1
    assert total_variation("aaab", "ab") == pytest.approx(0.25)
    short, long = ["one two"] * 10, [f"{'w ' * n}" for n in range(1, 30)]
    assert lengths(long, long)["total variation"] == 0 and lengths(short, long)["total variation"] > 0.8
    assert lengths(short, long)["words"] == [2.0] * 5


def test_the_distance_is_1_for_the_same_and_falls_with_the_difference() -> None:
    same = np.array([0.2, 0.3, 0.5])
    assert frontier_area(same, same) == pytest.approx(1, abs=1e-9)
    assert frontier_area(np.array([1.0, 0.0]), np.array([0.0, 1.0])) < 0.01
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 8, generator=generator)
    assert distance(points, points) == pytest.approx(1, abs=1e-6)
    alike = distance(points, torch.randn(300, 8, generator=generator))
    near = distance(points, torch.randn(300, 8, generator=generator) + 0.7)
    far = distance(points, torch.randn(300, 8, generator=generator) + 5)
    assert 0.7 < alike <= 1 and far < 0.05 and far < near < alike


def test_clusters_are_those_that_were_planted() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    points = (centres[:, None] + torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))).reshape(-1, 2)
    owner = clusters(points, 3, seed=0).reshape(3, 40)
    assert (owner == owner[:, :1]).all() and len(owner[:, 0].unique()) == 3
    assert clusters(torch.zeros(5, 2), 3, seed=0).tolist() == [0] * 5


def test_an_embedding_does_not_depend_on_the_texts_beside_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    texts = ["Return the value.", "A longer text, which is there for the padding of the first."]
    both, alone = embed(model, tokenizer, texts, 64), embed(model, tokenizer, texts[:1], 64)
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


def test_a_classifier_learns_from_labels_that_fit_and_from_others_not() -> None:
    texts = [f"{word} {other}" for word in ("import", "return") for other in WORDS * 3]
    labels = ["a"] * 30 + ["b"] * 30
    classifier = Classifier(str(ENCODER), steps=25, batch_size=16, seq_len=8)
    fits = classifier.score(Labelled(texts, labels), Labelled(texts, labels), ["a", "b"], seed=0)
    swapped = classifier.score(Labelled(texts, labels[::-1]), Labelled(texts, labels), ["a", "b"], seed=0)
    assert fits["accuracy"] > 0.95 and fits["macro F1"] > 0.95 and swapped["accuracy"] < 0.05
    some = Labelled(texts, labels).some(7, seed=1)
    assert len(some.texts) == 7 and all(
        labels[texts.index(x)] == y for x, y in zip(some.texts, some.labels, strict=True)
    )
    assert sorted(Labelled(texts, labels).some(99, seed=1).texts) == sorted(texts)


# --- the folder that is published


def made(**changed: object) -> Made:
    fields = {
        "model": "the base model",
        "data": "mails",
        "statement": "## Privacy statement\n\nepsilon 8",
        "private": True,
        "conditions": Conditions({"label": ("a", "b")}),
        "values_from_data": False,
        "distribution": "a uniform distribution",
        "sampling": Sampling(seed=5),
        "rules": Rules(("label",), must_match="x"),
        "generated": 9,
        "kept": (2, 1),
        "cut": 1,
        "rejected": {"too short": 6},
        "versions": "torch",
    }
    return Made(**{**fields, **changed})  # type: ignore[arg-type]  # a dictionary for brevity


def test_the_folder_has_the_texts_and_the_card_and_nothing_else(tmp_path: Path) -> None:
    rows = [{"label": "a"}, {"label": "a"}, {"label": "b"}]
    write(tmp_path / "synthetic", rows, ["one", "two", "three\nlines"], "body", made())
    assert sorted(path.name for path in (tmp_path / "synthetic").iterdir()) == ["README.md", "synthetic.parquet"]
    read = load_dataset("parquet", data_files=str(tmp_path / "synthetic" / "synthetic.parquet"), split="train")
    assert read.column_names == ["label", "body"] and read[2] == {"label": "b", "body": "three\nlines"}
    text = (tmp_path / "synthetic" / "README.md").read_text()
    for part in (
        "## Privacy statement",
        "epsilon 8",
        "too short: 6",
        "seed 5",
        "must match 'x'",
        "| a | 2 |",
        "3 texts",
    ):
        assert part in text
    assert str(tmp_path) not in text
    (tmp_path / "synthetic" / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError, match="published whole"):
        write(tmp_path / "synthetic", rows, ["one", "two", "three"], "body", made())


def test_the_card_says_what_is_not_private_and_what_became_public() -> None:
    text = card(made(private=False))
    assert "WITHOUT PRIVACY" in text and "NOT PRIVATE" in text and "post-processing" not in text
    assert "taken from the private records" in card(made(values_from_data=True))
    assert "taken from the private records" not in card(made())


# --- the recipe

SMALL = ["--num-steps", "2", "--expected-batch-size", "12", "--eval-every", "0", "--max-eval-examples", "8"]
SMALL += ["--seq-len", "48", "--generate", "30", "--max-new-tokens", "12", "--generation-batch-size", "8"]
SMALL += ["--min-chars", "2", "--classifier-steps", "2", "--cpu-threads", "1"]


def numbers(value: object) -> list[float]:
    """Every number in the file of private figures, but the first section's: it counts texts."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, float) else []


def private_figures_in(card: str, figures: dict[str, object]) -> list[str]:
    """Figures that a card discloses, rounded in any usual way; those with no digits of their own (0, 0.5, 3) not."""
    found = []
    for number in numbers(figures):
        for words in {f"{number:.3g}", f"{number:.3f}", f"{number:.1%}", repr(number)}:
            if len(words.strip("0.%")) >= 3 and re.search(rf"(?<![\d.]){re.escape(words)}(?!\d)", card):
                found.append(words)
    return found


def check_folder(output: Path, columns: list[str]) -> Dataset:
    """What can be published is there, alone, and nothing in it is a private figure. Returns the data."""
    folder = output / "synthetic"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "synthetic.parquet"]
    data = load_dataset("parquet", data_files=str(folder / "synthetic.parquet"), split="train")
    assert data.column_names == columns and 0 < len(data) <= 30
    card = (folder / "README.md").read_text()
    figures = json.loads((output / "measures_private.json").read_text())
    assert "Not for publication" in figures["note"]
    assert len(numbers(figures)) > 20 and not private_figures_in(card, figures)
    one = next(number for number in numbers(figures) if len(f"{number:.3g}".strip("0.")) >= 3)
    assert private_figures_in(f"{card}\nsimilarity {one:.3g}", figures)  # a planted one is found
    assert "## Privacy statement" in card and "post-processing" in card and str(output) not in card
    assert not private_figures_in((output / "README.md").read_text(), figures)
    return data


@pytest.mark.slow
def test_one_process_and_two_write_a_folder_that_can_be_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"body": f"The {w} number {n} is here.", "kind": w, "tag": n % 2} for n in range(90) for w in ("cat", "dog")
    ]
    (tmp_path / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", str(tmp_path / "mails.jsonl"), "--text-column", "body", *SMALL]
    words += ["--condition-on", "kind,tag", "--weights", "cat=3,dog=0", "--noise-multiplier", "0.5"]
    alone = [*words, "--output-dir", str(tmp_path / "one")]
    assert synthesize_dp.main(alone) == 0
    told = capsys.readouterr().out
    assert "becomes public" in told and "Not for publication" in told
    data = check_folder(tmp_path / "one", ["kind", "tag", "body"])
    assert set(data["kind"]) == {"cat"} and set(data["tag"]) == {"0", "1"}
    assert "taken from the private records" in (tmp_path / "one" / "synthetic" / "README.md").read_text()

    # other texts of the same model: no step is taken
    gc.collect()  # the ledger's lock ends with the objects of the first run
    ledger = (tmp_path / "one" / "ledger.jsonl").read_text()
    assert synthesize_dp.main([*alone, "--resume-from-checkpoint", "--weights", "cat=0,dog=1", "--no-measures"]) == 0
    assert set(check_folder(tmp_path / "one", ["kind", "tag", "body"])["kind"]) == {"dog"}
    releases = [line for line in ledger.splitlines() if line.startswith('{"release"')]
    again = (tmp_path / "one" / "ledger.jsonl").read_text().splitlines()
    assert [line for line in again if line.startswith('{"release"')] == releases and len(releases) == 2

    words += ["--values", "kind=cat,dog;tag=0,1", "--output-dir", str(tmp_path / "two")]
    recipe = ROOT / "tests" / "engines" / "recipe_on_cpu.py"
    told = succeed(launch("ddp", recipe, "--recipe", "synthesize_dp", *words, scratch=tmp_path, timeout=280))
    assert "becomes public" not in told
    assert len(check_folder(tmp_path / "two", ["kind", "tag", "body"])) > 15  # both ranks' share


@pytest.mark.slow
def test_where_parameters_are_sharded_rank_0_generates(tmp_path: Path) -> None:
    recipe, output = ROOT / "tests" / "engines" / "recipe_on_cpu.py", tmp_path / "out"
    words = ["--recipe", "synthesize_dp", *SMALL, "--no-compare-untuned", "--classifier", "none", "--lora-r", "2"]
    succeed(launch("fsdp2", recipe, *words, "--output-dir", str(output), scratch=tmp_path, timeout=280))
    assert set(check_folder(output, ["label", "text"])["label"]) <= {some.split(" {")[0] for some in TROUBLES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distribution", "private"], "need a budget of their own"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--weights", "a"], "no value and number"),
        (["--must-match", "("], "no regular expression"),
        (["--values", "a,b"], "is not among the 2 public ones"),
        (["--weights", "will not start=1"], "names 1 of the 5 values"),
        (["--max-new-tokens", "90"], "leaves"),
        (["--condition-on", "folder"], "the data has the columns text, label"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_before_the_training(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "TICKET_CUSTOMERS", 20)
    with pytest.raises(SystemExit) as stop:
        synthesize_dp.main([*words, "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
