"""Which implementation runs: one that is named is never replaced, and Triton stays optional."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpft.errors import KernelError
from dpft.kernels import linear_grad_sq_norm, linear_sq_norm, resolve_impl

HERE = torch.ones(1, 2, 3)


def test_auto_says_what_it_takes() -> None:
    taken, reason = resolve_impl(HERE, "auto")
    assert taken == "torch" and "Triton" in reason
    assert resolve_impl(HERE, "torch")[0] == "torch"
    assert torch.equal(linear_sq_norm(HERE, HERE), linear_sq_norm(HERE, HERE, impl="torch"))


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="impl is 'cuda'"):
        linear_sq_norm(HERE, HERE, impl="cuda")  # type: ignore[arg-type]  # what is tested


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function in (linear_sq_norm, linear_grad_sq_norm):
        with pytest.raises(KernelError, match=r"dpft\[triton\]"):
            function(HERE, HERE, impl="triton")


@pytest.mark.slow
def test_dpft_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"  # an import of it raises ImportError
        "import dpft.kernels, torch\n"
        "x = torch.ones(1, 2, 3)\n"
        "assert dpft.kernels.linear_sq_norm(x, x).item() == 36\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=120)


class TestTriton:
    """Where it is installed, and neither a GPU nor the interpreter is needed."""

    @pytest.fixture(autouse=True)
    def fused(self) -> Iterator[Any]:
        pytest.importorskip("triton", reason="triton is not installed: dpft[triton]")
        if os.environ.get("TRITON_INTERPRET"):
            pytest.skip("this process was started with TRITON_INTERPRET")
        from dpft.kernels import triton as fused

        fused._chosen.clear()
        yield fused
        fused._chosen.clear()

    def test_tensors_that_are_not_on_a_gpu_are_refused(self) -> None:
        for function in (linear_sq_norm, linear_grad_sq_norm):
            with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
                function(HERE, HERE, impl="triton")

    def test_other_dtypes_are_refused(self, fused: Any) -> None:
        x, g = HERE.double(), HERE
        for bad in ((x, x), (x, g), (g, g.bfloat16()), (g, g.to("meta"))):
            for function in (fused.feature_sq_norm, fused.gram_sq_norm):
                with pytest.raises(KernelError, match=r"impl='torch'"):
                    function(*bad)
        with pytest.raises(KernelError, match="float64"):
            fused.grad_sq_norm(g, g, torch.float64)

    def test_tiles_are_timed_once_per_kind_of_shape(self, fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        timed: list[Any] = []
        choices = fused.GRAM_TILES[4]
        fast = choices[-1]

        def milliseconds(launch: Any, tiles: Any) -> float:
            timed.append(tiles)
            return 1.0 if tiles == fast else 2.0

        monkeypatch.setattr(fused, "_milliseconds", milliseconds)
        used: list[Any] = []

        def launch(tiles: Any) -> torch.Tensor:
            used.append(tiles)
            return torch.ones(1, 2)

        def run(tokens: int, p: int = 8, name: str = "gram", batch: int = 1) -> None:
            x = torch.ones(batch, tokens, p)
            assert fused._run(name, x, x, choices, launch).tolist() == [2.0]

        run(1100)
        assert timed == list(choices) and used == [fast]
        run(2000)  # another length, no other measurement
        run(1100)
        assert len(timed) == len(choices) and used == [fast] * 3
        for n, other in enumerate(({"p": 16}, {"name": "feature"}, {"batch": 4}, {"tokens": 9000}), start=2):
            run(**{"tokens": 1100, **other})
            assert len(timed) == n * len(choices), other
        torch.use_deterministic_algorithms(True)
        try:
            run(1100)
        finally:
            torch.use_deterministic_algorithms(False)
        assert used[-1] == choices[0] and len(timed) == 5 * len(choices)

    def test_a_device_for_which_all_tiles_are_too_large(self, fused: Any) -> None:
        def out_of_shared_memory(tiles: Any) -> torch.Tensor:
            raise fused.OutOfResources(2, 1, "shared memory")

        with pytest.raises(KernelError, match="shared memory"):
            fused._run("gram", HERE, HERE, fused.GRAM_TILES[4], out_of_shared_memory)

    @pytest.mark.slow  # a compiler, for seconds
    @pytest.mark.parametrize(("dtype", "capability"), [("fp32", 90), ("bf16", 80), ("bf16", 90)])
    def test_kernels_compile(
        self, fused: Any, dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """To PTX, for GPUs that need not be there: on tensor cores, without TF32, without atomic operations."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        size = 4 if dtype == "fp32" else 2
        row, col, depth, warps, stages = fused.PRODUCT_TILES[size][0]
        product = {"ROWS": row, "COLS": col, "DEPTH": depth, "EMULATED": False}
        block, _, gram_depth, *gram_options = fused.GRAM_TILES[size][0]
        gram = {"BLOCK": block, "DEPTH": gram_depth, "EMULATED": False, "WIDE": size == 4}
        cases = (
            (fused._product_kernel, {**product, "out": None}, (warps, stages)),
            (fused._product_kernel, product, (warps, stages)),
            (fused._gram_kernel, gram, gram_options),
        )
        pointers = {"x": f"*{dtype}", "g": f"*{dtype}", "out": f"*{dtype}", "partial": "*fp64"}
        for kernel, constants, (num_warps, num_stages) in cases:
            constants = {**constants, "x_p": 1, "g_d": 1}
            signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
            ptx = fused.triton.compile(
                ASTSource(kernel, signature, constants),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": num_warps, "num_stages": num_stages},
            ).asm["ptx"]
            assert not re.search(r"tf32|\b(atom|red)\.", ptx)
            assert ("mma." in ptx) == (dtype == "bf16" or kernel is fused._gram_kernel)


def test_a_method_that_triton_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed: dpft[triton]")
    monkeypatch.setattr("dpft.kernels.linear.resolve_impl", lambda x, impl: ("triton", "named"))
    with pytest.raises(ValueError, match="gram_full"):
        linear_sq_norm(HERE, HERE, "gram_full", impl="triton")
