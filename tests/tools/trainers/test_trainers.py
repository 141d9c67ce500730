"""tools/profile_trainers.py: a run from end to end, the trainers' gradients, what is counted of their operators."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.oracle import oracle
from tools.benchmarks.cases import Method, Shape, build_model, input_ids, plain
from tools.common.worker import WorkerError
from tools.profile_trainers import main
from tools.trainers import options, profiles
from tools.trainers.implementations import TRAINERS, Trainer
from tools.trainers.measurement import failure, profile_apart
from tools.trainers.operators import CLASSES, PLACES, Count, OperatorCounter, class_of
from tools.trainers.report import complete, tables
from tools.trainers.worker import PHASES, Job, Session

TINY = Shape(width=64, layers=1, vocab=97, tokens=16, rows=3)
PRIVATE = [name for name in TRAINERS if name != "StandardTrainer"]
PLANTED = ("Raises", "Dies")
ENVIRONMENT = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF")
HERE = "tests.tools.trainers.test_trainers"


class Raises(Trainer):
    def backward(self, loss: Any) -> None:
        raise ValueError("planted\nand a second line")


class Dies(Trainer):
    def backward(self, loss: Any) -> None:
        os._exit(3)


class Hangs(Trainer):
    def backward(self, loss: Any) -> None:
        time.sleep(600)


def keep_environment(patch: pytest.MonkeyPatch) -> None:
    """What a run sets is taken back."""
    for name in ENVIRONMENT:
        patch.setenv(name, os.environ.get(name, "1"))


def make(name: str, shape: Shape, **options: Any) -> Trainer:
    trainer = TRAINERS[name]
    model = build_model(shape, "cpu", Method(plain, reentrant=trainer.reentrant))
    return trainer(model, rows=shape.rows, **options)


def gradients(trainer: Trainer, ids: Tensor) -> dict[str, Tensor]:
    """What the optimiser steps on."""
    trainer.backward(trainer.forward(ids))
    trainer.step()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.zero_grad()
    return found


@pytest.mark.parametrize("shape", [TINY, replace(TINY, architecture="gpt2", checkpointing=True)], ids=str)
def test_gradient_of_every_trainer_is_the_clipped_sum(shape: Shape) -> None:
    ids = input_ids(shape, "cpu")
    exact = oracle(build_model(shape, "cpu"), {"input_ids": ids, "labels": ids})
    bound = float(exact.norms.sort().values[:2].mean())  # one example of three is below it
    for name in TRAINERS:
        found = gradients(make(name, shape, noise_multiplier=0.0, max_grad_norm=bound), ids)
        factors = torch.ones(3) if name == "StandardTrainer" else exact.factors(bound)
        assert name == "StandardTrainer" or int((factors < 1).sum()) == 2
        for key, expected in exact.weighted_sum(factors / shape.rows).items():
            error = float((found[key].double() - expected).norm() / expected.norm())
            assert error < 1e-4, (name, key)


def test_private_trainers_add_the_same_noise_and_take_the_same_optimiser() -> None:
    shape = replace(TINY, width=128)
    ids = input_ids(shape, "cpu")
    settings = make("StandardTrainer", shape).optimizer.defaults
    for name in PRIVATE:
        trainer = make(name, shape, noise_multiplier=2.0, max_grad_norm=5e-3)
        noise = torch.cat([grad.flatten() for grad in gradients(trainer, ids).values()])
        # The clipped sum, of norm 3 C at most, is far below noise of 2 C in each of 200,000 elements.
        assert float(noise.std()) * shape.rows / 5e-3 == pytest.approx(2.0, rel=0.01), name
        assert trainer.optimizer.defaults == settings and settings["lr"] == 1e-4


def counted(operation: Any) -> Count:
    """What a counter makes of some operators outside any trainer."""
    with OperatorCounter() as counter:
        operation()
    assert all(counter.counts[name] == Count() for name in CLASSES if not name.startswith("model"))
    products, other = counter.counts["model products"], counter.counts["model other"]
    return Count(products.calls + other.calls, products.bytes + other.bytes, products.flops + other.flops)


def test_bytes_of_known_operators_are_exact() -> None:
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 5)
    matrix, wide = 4 * 15, torch.randn(1, 5).expand(3, 5)
    expected = {
        "mm": (lambda: a @ b, 4 * (15 + 35 + 21), 2 * 3 * 5 * 7),
        "out of place": (lambda: a * c, 3 * matrix, 0),
        "in place": (lambda: c.mul_(a), 2 * matrix, 0),
        "one tensor twice": (lambda: a + a, 2 * matrix, 0),
        "into": (lambda: torch.mul(a, c, out=c), 2 * matrix, 0),
        "expanded": (lambda: a * wide, 2 * matrix + 4 * 5, 0),
        "half": (lambda: a.to(torch.bfloat16), matrix + matrix // 2, 0),
        "views": (lambda: a.t().unsqueeze(0).expand(4, 5, 3)[1:].detach(), 0, 0),
        "reshaped": (lambda: torch.ops.aten._unsafe_view(a, [15]), 0, 0),
        "allocated": (lambda: (torch.empty(9), torch.empty_like(a), a.new_empty(4)), 0, 0),
        "zeros": (lambda: torch.zeros(9), 4 * 9, 0),
        "list": (lambda: torch._foreach_mul_([c, b], 2.0), 4 * (15 + 35), 0),
        "sum": (lambda: a.sum(1), 4 * (15 + 3), 0),
    }
    for name, (operation, moved, flops) in expected.items():
        found = counted(operation)
        assert (name, found.bytes, found.flops) == (name, moved, flops)
        assert (found.calls > 0) == (moved > 0)


def test_classes_of_every_trainers_operators_are_exact() -> None:
    """Products by class, from the shapes of the linear layers: what is made, how often, and for whom."""
    shape = replace(TINY, tokens=128, rows=2)  # dpft keeps per-example gradients where they are smaller than inputs
    ids = input_ids(shape, "cpu")
    model = build_model(shape, "cpu")
    sizes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    numels = [p.numel() for p in model.parameters()]
    b, t = shape.rows, shape.tokens
    once = sum(2 * b * t * d * p for d, p in sizes)
    # Of those that are kept, the embedding's too, the weighted sum is a product with the factors.
    kept = sum(d * p for d, p in sizes if d * p <= t * (d + p)) + model.get_input_embeddings().weight.numel()
    grams = sum(2 * b * t * t * (d + p + 1) for d, p in sizes)
    expected = {
        "StandardTrainer": (3 * once, 0),
        "DPSGDTrainer": (3 * once, once + sum(2 * b * n for n in numels)),
        "DPGhostClippingTrainer": (5 * once, grams),
        "DPFastGradientClippingTrainer": (5 * once, once),
        "DPFlashClippingTrainer": (2 * once, once + 2 * b * kept),
    }
    moved = {}
    for name in TRAINERS:
        trainer = make(name, shape)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for _ in range(2):  # the second makes dpft's isolation check
            trainer.train_step(ids)
        assert not any(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
        with OperatorCounter() as counter:
            trainer.train_step(ids)
        counts = moved[name] = counter.counts
        assert (name, counts["model products"].flops, counts["einsum"].flops) == (name, *expected[name])
        private = {c for c in CLASSES if not c.startswith("model") and c != "optimiser" and counts[c].bytes}
        assert private == (set(CLASSES[:4]) | {"noise"} if name in PRIVATE else set())
        assert counts["optimiser"].bytes > 4 * 4 * sum(numels)  # parameter, gradient and two moments
        assert all(count.seconds > 0 for count in counts.values() if count.bytes)
    # The head's two products of a chunk are as large as each other.
    assert (class_of("mm.out", "head"), class_of("addmm.out", "head")) == ("model products", "einsum")
    # One norm a parameter, of [B, ...], and one of the norms [B, P].
    norms = sum(b * n + b for n in numels) + b * len(numels) + b
    assert moved["DPSGDTrainer"]["norm"].bytes == 4 * norms
    # Two reads and two writes of each sum and its noise, and the noise's own making, or in place from the host's.
    assert moved["DPSGDTrainer"]["noise"].bytes > moved["DPFlashClippingTrainer"]["noise"].bytes == 3 * 4 * sum(numels)


def test_places_name_code_that_exists() -> None:
    for module, functions in PLACES.items():
        file = Path(importlib.import_module(module).__file__ or "")
        files = file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
        source = "\n".join(path.read_text() for path in files)
        for function in functions.keys() - {"*"}:
            assert re.search(rf"^ *def {function}\b", source, re.MULTILINE), f"{module}: {function}"


@pytest.mark.slow
def test_mode_test(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in small, with trainers that fail among the five; one test, for pytest's workers would each run it."""
    names = [*list(TRAINERS)[:2], *(f"{HERE}:{name}" for name in PLANTED), *list(TRAINERS)[2:]]
    keep_environment(monkeypatch)
    monkeypatch.setattr(options, "TEST", TINY)
    monkeypatch.setattr(profiles, "TRAINERS", names)
    words = ["--mode", "test", "--steps", "3", "--threads", "1", "--output-dir", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "copy.json")]) == 0
    (directory,) = (path for path in tmp_path.iterdir() if path.is_dir())
    report = json.loads((directory / "results.json").read_text())
    assert report == json.loads((tmp_path / "copy.json").read_text())
    assert report["schema"] == "dpft.trainers_profile/1"
    (result,) = report["results"]
    rows = {row["trainer"]: row for row in result["rows"]}
    assert list(rows) == names
    printed = capsys.readouterr().out
    check_results(rows)
    check_failures(rows, printed, directory)
    check_traces(rows, directory)
    check_text(rows, printed, directory)


def check_results(rows: dict[str, Any]) -> None:
    model = build_model(TINY, "cpu")
    size = sum(p.numel() for p in model.parameters())
    state = 8 * size + 4 * len(list(model.parameters()))  # two moments, and a counter of steps each
    plain_row = rows["StandardTrainer"]
    for name in TRAINERS:
        row = rows[name]
        assert row["status"] == "ok" and row["reason"] is None
        assert (row["parameters"], row["parameter_bytes"]) == (size, 4 * size)
        assert row["optimizer_state_bytes"] == state
        assert row["peak_bytes"] >= 8 * size + state  # parameters and gradients
        assert len(row["seconds"]["values"]) == 3
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        phases = sum(row["phases"][phase]["max"] for phase in PHASES)
        assert phases >= row["seconds"]["max"] * (1 - 1e-3)  # of values rounded to five places
        assert row["timing"] == {
            "interleaved_with": [other for other in TRAINERS if other != name],
            "alone_because": None,
        }
        rounds = zip(row["seconds"]["values"], plain_row["seconds"]["values"], strict=True)
        assert row["time_over_plain"]["values"] == pytest.approx([a / b for a, b in rounds], rel=1e-3)
        assert row["time_ratio"] == row["time_over_plain"]["median"]
        assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / plain_row["peak_bytes"], rel=1e-3)
        assert row["bytes_moved"] == sum(count["bytes"] for count in row["classes"].values())
        assert sum(o["share"] for o in row["operators"]) == pytest.approx(1, abs=1e-2)
        names = [o["name"] for o in row["operators"]]
        assert "aten::mm" in names and not set(PHASES) & set(names)
        assert row["operators"] == sorted(row["operators"], key=lambda o: -o["seconds"])
    assert plain_row["retained_bytes"] == plain_row["retained_gradient_bytes"] == 0
    assert all(plain_row[f"{what}_ratio"] == 1 for what in ("time", "peak", "bytes", "flops"))
    for name in PRIVATE[:3]:  # Opacus' zero_grad() writes zeros by default
        assert rows[name]["retained_gradient_bytes"] == 4 * size <= rows[name]["retained_bytes"]
    assert rows["DPFlashClippingTrainer"]["retained_gradient_bytes"] == 0
    assert 0 < rows["DPFlashClippingTrainer"]["retained_bytes"] < 1024


def check_failures(rows: dict[str, Any], printed: str, directory: Path) -> None:
    for name, reason in {"Raises": "ValueError: planted", "Dies": "its process ended with status 3"}.items():
        row = rows[f"{HERE}:{name}"]
        assert (row["status"], row["reason"]) == ("failed", reason)
        assert f"{HERE}:{name}: {reason}\n" in printed
    (log,) = directory.glob("*Raises*/log.txt")
    assert "Traceback" in log.read_text() and "and a second line" in log.read_text()
    exhausted = {"status": "out_of_memory", "reason": "out of memory (OutOfMemoryError: planted)"}
    assert failure(WorkerError("out of memory (OutOfMemoryError: planted)", out_of_memory=True)) == exhausted


def check_traces(rows: dict[str, Any], directory: Path) -> None:
    for name in TRAINERS:
        path = directory / rows[name]["trace"]
        assert path.parent.name == f"{name}_llama64x1_B3_T16_float32" and path.name.endswith(".pt.trace.json")
        events = json.loads(path.read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert {*PHASES, "aten::mm"} <= set(names) and names.count("forward") == 2
        assert events[names.index("aten::mm")]["args"]["Input Dims"]  # shapes were recorded
    assert not list(directory.rglob(".*"))  # nothing half-written


def check_text(rows: dict[str, Any], printed: str, directory: Path) -> None:
    summary = (directory / "summary.txt").read_text()
    tables = printed.partition("\n\n" + str(directory))[0]
    assert tables in summary and f"torch {torch.__version__.partition('+')[0]}" in summary.splitlines()[0]
    for name in TRAINERS:
        row = rows[name]
        assert row["answer"] in summary
        assert re.search(rf"^  {name} .* {row['bytes_moved'] / 2**20:.1f} ", summary, re.MULTILINE)
    ghost = rows["DPGhostClippingTrainer"]
    times = re.search(r"takes ([\d.]+) x the time of StandardTrainer", ghost["answer"])
    assert times and float(times[1]) == pytest.approx(ghost["time_ratio"], abs=0.006)  # of two places
    assert f"{ghost['peak_ratio']:.2f} x (" in ghost["answer"]
    assert f"{ghost['classes']['einsum']['bytes'] / 2**20:.1f} MiB in matrix products of the" in ghost["answer"]


def a_row(name: str, **seconds: float) -> dict[str, Any]:
    """A row whose classes take a second each, and norms what is given."""
    row = {"trainer": name, "status": "ok", "seconds": dict.fromkeys(("median", "min", "max"), 4.0), "parameters": 1}
    row["classes"] = {c: asdict(Count(1, 2**20, 1, seconds.get(c, 1.0))) for c in CLASSES}
    row["phases"] = {phase: {"median": 1.0} for phase in PHASES}
    row["operators"] = [{"name": "aten::mm", "seconds": seconds.get("mm", 1.0), "calls": 1, "share": 1.0}]
    return {**row, "peak_bytes": 2**20, "retained_bytes": 0, "retained_gradient_bytes": 0, "parameter_bytes": 4}


def test_answer_names_the_largest_changes() -> None:
    slower = a_row("DPSGDTrainer", norm=3.0, mm=0.5)
    slower["phases"]["backward"]["median"] = 2.5
    slower["seconds"]["median"] = 6.0
    text = complete({"rows": [a_row("StandardTrainer"), slower]})["rows"][1]["answer"]
    assert "takes 1.50 x the time of StandardTrainer: 6000.0 against 4000.0 ms" in text
    assert "difference of +2000.0 ms, of which +1500.0 ms in the backward" in text
    assert "ms in all: +2000.0 ms in norms" in text and "changes: -500.0 ms in aten::mm." in text


def test_without_plain_training_nothing_is_compared() -> None:
    failed = {"trainer": "StandardTrainer", "status": "failed", "reason": "planted"}
    result = complete({"title": "", "device": "cpu", "rows": [failed, a_row("DPSGDTrainer")]})
    assert result["rows"][0] == failed
    row = result["rows"][1]
    assert all(row[f"{what}_ratio"] is None for what in ("time", "peak", "bytes", "flops"))
    assert "nothing to compare with" in row["answer"] and " x the time" not in row["answer"]
    assert re.search(r"DPSGDTrainer +4000\.0 +4000\.0 +4000\.0 +- ", tables(result))


def test_settled_steps_have_no_isolation_check(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Job("StandardTrainer", TINY, "cpu", 1, 1, 1, Path("unused")))
    monkeypatch.setattr(session, "step", lambda ids: setattr(session, "steps", session.steps + 1))
    for session.steps, count in ((0, 1), (0, 2), (3, 1), (4, 1), (6, 2), (7, 2)):
        session.settle(count)
        assert not {session.steps + k for k in range(1, count + 1)} & {1, 2, 4, 8, 16}


@pytest.mark.slow
def test_interruption_ends_the_child(tmp_path: Path) -> None:
    children: list[Any] = []

    def interrupt() -> None:
        while not children:
            children.extend(c for c in multiprocessing.active_children() if c.name == f"{HERE}:Hangs")
            time.sleep(0.01)
        time.sleep(0.5)  # until the answer is waited for
        os.kill(os.getpid(), signal.SIGINT)

    job = Job(f"{HERE}:Hangs", TINY, "cpu", 1, 1, 1, tmp_path / "trace.pt.trace.json")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            profile_apart(job)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not children[0].is_alive() and not psutil.pid_exists(children[0].pid)


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_was_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: Job) -> dict[str, Any]:
        if job.trainer != "StandardTrainer":
            raise KeyboardInterrupt
        return {"machine": {}, **a_row("StandardTrainer")}

    keep_environment(monkeypatch)
    monkeypatch.setattr(profiles, "profile_apart", interrupted)
    assert main(["--mode", "test", "--output-dir", str(tmp_path)]) == 130
    (results,) = tmp_path.glob("*/results.json")
    assert [row["trainer"] for row in json.loads(results.read_text())["results"][0]["rows"]] == ["StandardTrainer"]
    assert str(results.parent) in capsys.readouterr().err
