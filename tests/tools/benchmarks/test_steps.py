"""tools/benchmark_steps.py: a run from end to end with methods that are wrong or fail, and its parts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import benchmark_steps
from tools.benchmarks.cases import METHODS, Shape, build_model, find_method
from tools.benchmarks.digest import Error, digest, error_of
from tools.benchmarks.oracle import clipped_sum, limit_of
from tools.benchmarks.presets import PRESETS, Longest, Run
from tools.benchmarks.runner import Budget, Machine, ShapeRunner, longest_context
from tools.benchmarks.worker import Case
from tools.common.failures import out_of_memory, reason_of
from tools.common.json_files import write_json
from tools.common.meter import Meter
from tools.common.worker import Worker, WorkerError

OPTIONS = ("--device", "cpu", "--threads", "1")
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF")
PLANTED = ("unclipped", "small_parameter", "wrong_when_long", "raises", "dies", "allocates")


def quiet(line: str) -> None:
    """For ``say``."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What one run writes and prints: T = 80 is more than the oracle's 64."""
    path = tmp_path_factory.mktemp("steps") / "steps.json"
    size = ["--width", "64", "--layers", "1", "--vocab", "97", "--tokens", "80", "--rows", "2", "--rounds", "1"]
    methods = ["plain", "one_pass", "opacus_ghost", *(f"tests.tools.trainers.planted:{name}" for name in PLANTED)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name in ENVIRONMENT:
            patch.setenv(name, os.environ.get(name, "1"))  # what is set by the run is taken back
        patch.setattr(sys, "argv", ["benchmark_steps.py", *size, "--methods", *methods, *OPTIONS, "--json", str(path)])
        assert benchmark_steps.main() == 0
    written = json.loads(path.read_text())
    written["printed"] = printed.getvalue()
    written["plotted"] = path.with_suffix(".png").stat().st_size
    written["folder"] = sorted(p.name for p in path.parent.iterdir())
    yield written


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the one shape, by method without its module."""
    (result,) = report["results"]
    return {row["method"].rpartition(":")[2]: row for row in result["rows"]}


@pytest.mark.slow
def test_what_is_right_is_timed(report: dict[str, Any]) -> None:
    rows = rows_of(report)
    for name in ("plain", "one_pass", "opacus_ghost"):
        row = rows[name]
        assert row["seconds"]["median"] > 0 and row["rounds"] == 1 and "reason" not in row
        seconds = row["seconds"]["median"]
        assert row["time_ratio"]["median"] == pytest.approx(seconds / rows["plain"]["seconds"]["median"], rel=1e-3)
    assert rows["plain"]["time_ratio"]["median"] == rows["plain"]["memory_ratio"] == rows["plain"]["flops_ratio"] == 1
    assert 0.9 < rows["one_pass"]["flops_ratio"] <= 1.02 < 1.2 < rows["opacus_ghost"]["flops_ratio"]
    for name in ("one_pass", "opacus_ghost"):
        assert 0 < rows[name]["error"] <= report["results"][0]["allowed_error"]["whole"]
    gradient = 4 * rows["plain"]["parameters"]
    assert rows["plain"]["peak_bytes"] > gradient

    faster = report["results"][0]["speedups"]["opacus_ghost"]["median"]
    assert faster == pytest.approx(seconds / rows["one_pass"]["seconds"]["median"], rel=1e-3)


@pytest.mark.slow
def test_what_is_wrong_is_refused_a_time(report: dict[str, Any]) -> None:
    rows = rows_of(report)
    for name in ("unclipped", "small_parameter", "wrong_when_long"):
        assert rows[name]["refused"] and rows[name]["reason"].startswith("wrong, so not timed"), rows[name]
        assert "seconds" not in rows[name] and "time_ratio" not in rows[name]
    small = rows["small_parameter"]
    assert small["error"] < 1e-4 and small["error_of_worst_parameter"] == pytest.approx(0.02, rel=0.01)
    assert rows["wrong_when_long"]["error"] == pytest.approx(1e-3, rel=0.3)
    assert "T=80" in rows["wrong_when_long"]["reason"]


@pytest.mark.slow
def test_what_fails_is_a_row_with_its_reason(report: dict[str, Any]) -> None:
    rows = rows_of(report)
    assert rows["raises"]["reason"] == "NotImplementedError: no rule for this"
    assert rows["dies"]["reason"] == "its process ended with status 7"
    assert rows["allocates"]["reason"].startswith("out of memory")
    for name in ("raises", "dies", "allocates"):
        assert rows[name]["reason"] in report["printed"] and "seconds" not in rows[name]


@pytest.mark.slow
def test_what_is_written(report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    for key in ("cpu", "cores", "threads", "python", "commit", "dirty", "memory_gib", "seconds_taken"):
        assert key in conditions
    assert conditions["threads"] == 1 == report["arguments"]["threads"]
    assert conditions["versions"]["torch"] == torch.__version__
    assert report["results"][0]["shape"]["tokens"] == 80 == report["arguments"]["tokens"][0]
    assert report["plotted"] > 5000 and report["folder"] == ["steps.json", "steps.png"]
    assert "one_pass" in report["results"][0]["plan"]["strategies"], report["results"][0]["plan"]
    assert report["results"][0]["auto"]["choice"] in ("one_pass", "two_pass", "per_example")
    assert "auto chose" in report["printed"] and "one_pass is" in report["printed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "plain", "onepass"], "expected one of plain"),
        (["--preset", "smoke", "--tokens", "8"], "brings its own shapes"),
        (["--tokens", "0"], "above 0"),
        (["--longest", "300", "256", "1024"], "multiples of the step"),
    ],
)
def test_arguments(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_steps.py", *arguments])
    try:
        status = benchmark_steps.main()
    except SystemExit as left:
        status = left.code  # type: ignore[assignment]  # argparse leaves with a number
    assert status == 2 and said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_digest_measures_an_error() -> None:
    """Of a large matrix within the sketch's deviation, of a small one exactly."""
    large, small = noise(300, 700), noise(11, 13, seed=1)
    off = 1e-3 * noise(300, 700, seed=2)
    true = digest({"large": large, "small": small})
    found = error_of(digest({"large": large + off, "small": small}), true)
    expected = float(off.norm() / (large.norm().square() + small.norm().square()).sqrt())
    assert found.whole == pytest.approx(expected, rel=0.3) and found.where == "large"
    changed = small.clone()
    changed[3, 4] += 0.5
    found = error_of(digest({"large": large, "small": changed}), true)
    assert found.worst == pytest.approx(float(0.5 / small.norm())) and found.where == "small"
    assert error_of(true, true) == Error(0.0, 0.0, "no parameter")


def test_digest_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk is no multiple of the buckets, and one entry in it counts once."""
    from tools.benchmarks import digest as digests

    monkeypatch.setattr(digests, "CHUNK", 512)
    values = torch.zeros(1100)
    values[1090] = 3.0
    assert sorted(abs(v) for v in digest({"v": values})["v"]) == [0.0] * 255 + [3.0]


@pytest.mark.parametrize("bad", [{"v": [1.0]}, {"w": [1.0, 2.0], "x": [0.0]}, {"w": [1.0, float("nan")]}])
def test_what_is_missing_or_not_finite_is_wrong(bad: dict[str, list[float]]) -> None:
    limit = Error(1.0, 1.0, "any parameter")
    assert not error_of(bad, {"w": [1.0, 2.0]}).within(limit)
    assert not Error(float("nan"), 0.0, "w").within(limit)
    assert not error_of({"w": [1e-9]}, {"w": [0.0]}).within(limit), "where nothing is due"


def test_limit_follows_plain_training() -> None:
    exact = {"w": [1.0, 0.0]}
    assert limit_of({"w": [1.03, 0.0]}, exact).whole == pytest.approx(0.06)
    assert limit_of(exact, exact).whole == 1e-4


def test_clipped_sum_refuses_what_would_not_show_a_wrong_norm() -> None:
    one = {"w": torch.tensor([3.0, 4.0])}
    torch.testing.assert_close(clipped_sum([one, one])["w"], 2e-3 * torch.tensor([0.6, 0.8]))
    with pytest.raises(ValueError, match="expected more than C"):
        clipped_sum([one, {"w": torch.tensor([1e-4, 0.0])}])


def test_meter_counts_bytes_and_flops() -> None:
    a = torch.ones(64, 64)
    with Meter([a]) as meter:
        b = a @ a
        c = b.view(-1) + 1
        del c
        torch.nn.functional.scaled_dot_product_attention(*[b.view(1, 2, 32, 64)] * 3)
    assert meter.flops == 2 * 64**3 + 2 * 2 * 2 * 32 * 32 * 64
    assert meter.live == 4 * 64 * 64 and meter.peak >= 2 * meter.live


@pytest.mark.slow
def test_isolation_checks_are_not_measured() -> None:
    """Backward 8, which dpft makes with its check, is a tiny one: all that is measured costs the same."""
    case = Case(Shape(width=64, layers=1, vocab=50, tokens=16, rows=2), "cpu", "one_pass")
    seen: list[tuple[int, int]] = []
    plain_step = case.gradients

    def recorded(ids: Tensor) -> dict[str, Tensor]:
        seen.append((case.steps, ids.shape[1]))
        return plain_step(ids)

    case.gradients = recorded
    flops = {case.probe()["flops"] for _ in range(5)}
    assert len(flops) == 1 and seen == [(5, 16), (6, 16), (7, 16), (8, 8), (9, 16), (10, 16)]


def test_frozen_norms_are_frozen_in_the_reference_too() -> None:
    shape = Shape(width=64, layers=1, vocab=50, tokens=16)
    fastdp = METHODS["fastdp"]
    frozen = [n for n, p in build_model(shape, "cpu", fastdp).named_parameters() if not p.requires_grad]
    assert len(frozen) == 3 and "RMSNorm weights frozen" in fastdp.remark(shape)
    case = Case(shape, "cpu", "per_example", frozen_norms=True)
    assert not set(frozen) & set(case.probe()["digest"])
    assert not fastdp.freezes(Shape("gpt2"))


def test_update_steps_the_optimiser() -> None:
    """A step of ours with noise moves every parameter and leaves no gradient; a check moves none."""
    case = Case(Shape(width=64, layers=1, vocab=50, tokens=16, update=True), "cpu", "one_pass")
    before = [p.detach().clone() for p in case.model.parameters()]
    assert case.check()["digest"] and all(map(torch.equal, before, case.model.parameters()))
    case.time(0)
    for old, p in zip(before, case.model.parameters(), strict=True):
        assert p.grad is None and not torch.equal(old, p)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_name_methods_and_can_be_built(name: str) -> None:
    preset = PRESETS[name]
    for run in preset.runs:
        assert [find_method(method) for method in run.methods] and "plain" in run.methods
        with torch.device("meta"):
            build_model(run.shape, "meta")


def test_gpu_preset_has_the_shapes_of_the_issue() -> None:
    shapes = [run.shape for run in PRESETS["gpu"].runs]
    large = [s for s in shapes if (s.width, s.layers, s.vocab, s.dtype) == (2048, 20, 32_000, "bfloat16")]
    assert {4096, 16_384, 65_536} <= {s.tokens for s in large}
    (one_b,) = [s for s in shapes if s.tokens == 131_072]
    count = sum(p.numel() for p in build_model(one_b, "meta").parameters())
    assert count == 1_235_814_400 and one_b.update and one_b.checkpointing  # that of meta-llama/Llama-3.2-1B


def test_spent_budget_is_a_reason() -> None:
    result = ShapeRunner(Run(Shape(), ("plain", "one_pass")), Machine("cpu", 1), Budget(0.0), quiet).result()
    assert [row["reason"] for row in result["rows"]] == ["not run: the time budget of 0 s is spent"] * 2


class FakeWorker:
    """Fits up to ``most`` tokens; dies beyond ``deadly``."""

    asked: list[int]

    def __init__(self, most: int, deadly: int = 1 << 40) -> None:
        self.most, self.deadly, self.asked = most, deadly, []

    def ask(self, name: str, *arguments: Any, seconds: float) -> Any:
        if name != "fits":
            return None
        self.asked.append(arguments[0])
        if arguments[0] > self.deadly:
            raise WorkerError("its process ended with status -9 (killed)")
        return arguments[0] <= self.most

    def end(self) -> None:
        """As a worker's."""


@pytest.mark.parametrize(
    ("most", "found", "reason"),
    [
        (0, 0, None),
        (5, 0, None),
        (100, 96, None),
        (64, 64, None),
        (95, 80, None),
        (112, 112, None),
        (511, 496, None),
        (10_000, 512, "not looked beyond"),
    ],
)
@pytest.mark.parametrize("dying", [False, True])
def test_longest_context_is_found(most: int, found: int, reason: str | None, dying: bool) -> None:
    fake = FakeWorker(1 << 40, deadly=most) if dying else FakeWorker(most)
    machine = Machine("cpu", 1)
    worker: Callable[[str], Any] = lambda label: fake  # noqa: E731  # in the place of a method
    machine.worker = worker  # type: ignore[method-assign]  # no process is to be started
    (row,) = longest_context(Longest(Shape(), ("plain",), 32, 16, 512), machine, Budget(100.0), quiet)
    assert (row["tokens"], row.get("reason")) == (found, reason)
    assert [t["fits"] for t in row["tried"]] == [t <= most for t in fake.asked]


def test_ratios_are_of_the_same_round_and_auto_is_held_against_the_best() -> None:
    runner = ShapeRunner(Run(Shape(), ("plain", "one_pass", "two_pass")), Machine("cpu", 1), Budget(1.0), quiet)
    for entry, seconds in zip(runner.entries, ([1.0, 2.0, 4.0], [1.1, 2.0, 4.8], [1.5, 2.5, 5.0]), strict=True):
        entry.seconds = seconds
    result = runner._result({"choice": "two_pass"})
    assert result["rows"][1]["time_ratio"] == pytest.approx({"median": 1.1, "min": 1.0, "max": 1.2})
    assert result["auto"] == {"choice": "two_pass", "best": "one_pass", "slower": pytest.approx(0.25)}
    assert runner._auto({"choice": "per_example"})["reason"] == "it was not timed"
    assert runner._auto({"reason": "no plan"}) == {"choice": None, "reason": "no plan"}


@pytest.mark.slow
def test_what_takes_too_long_is_stopped() -> None:
    worker = Machine("cpu", 1).worker("sleeper")
    worker.send(Case, Shape(), "cpu", "tests.tools.trainers.planted:sleeps")
    with pytest.raises(WorkerError, match="stopped after 0 s"):
        worker.receive(0.2)
    assert not worker.alive


@pytest.mark.slow
def test_an_interrupt_ends_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Worker] = []

    def answer(worker: Worker, *_: Any) -> None:
        made.append(worker)
        if len(made) == 2:
            raise KeyboardInterrupt

    runner = ShapeRunner(Run(Shape(), ("plain", "opacus_ghost")), Machine("cpu", 1), Budget(100.0), quiet)
    runner._once = lambda name: {}  # type: ignore[method-assign]  # no oracle
    monkeypatch.setattr(Worker, "send", lambda *command: None)
    monkeypatch.setattr(Worker, "receive", answer)
    with pytest.raises(KeyboardInterrupt):
        runner.result()
    assert len(made) == 2 and not any(worker.alive for worker in made)


def test_reasons() -> None:
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ...")
    assert out_of_memory(cpu) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("shape")) and reason_of(RuntimeError("")) == "RuntimeError: "


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    write_json(path, {"a": 0.123456789, "b": [float("inf")]})
    assert json.loads(path.read_text()) == {"a": 0.12346, "b": ["inf"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == ["inf"]
