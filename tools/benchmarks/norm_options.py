"""The command line of benchmark_norms.py: its presets, and the layers that its options name."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch

from tools.benchmarks.norm_tables import Layer
from tools.benchmarks.norm_times import ALLOWED
from tools.common.command_line import Parser
from tools.common.json_files import json_path


@dataclass(frozen=True)
class Preset:
    """Layers with their lengths, in this order, and the seconds after which nothing more is started."""

    device: str
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]
    seconds: float
    rounds: int
    impls: tuple[str, ...]


ALL = tuple(512 << k for k in range(7))


PRESETS = {
    "cpu": Preset(
        "cpu",
        (
            (Layer(1024, 1024), (512, 1024, 2048, 4096)),
            (Layer(512, 32_000), (512,)),
            (Layer(1024, 1024), (16_384,)),
            (Layer(256, 1024), (512, 4096)),
            (Layer(512, 512, 1, "bfloat16"), (512, 2048)),
            (Layer(1024, 1024, 4), (512, 2048)),
            (Layer(512, 32_000), (2048,)),
        ),
        seconds=170.0,
        rounds=5,
        impls=("torch",),
    ),
    "gpu": Preset(
        "cuda",
        (
            (Layer(1024, 1024), ALL),
            (Layer(2048, 2048, 1, "bfloat16"), ALL),
            (Layer(4096, 4096, 1, "bfloat16"), ALL),
            (Layer(2048, 128_256, 1, "bfloat16"), ALL),
            (Layer(2048, 5632, 4, "bfloat16"), (2048, 8192)),
            (Layer(4096, 4096), (4096, 16_384)),
        ),
        seconds=110.0,
        rounds=5,
        impls=("torch", "triton"),
    ),
    "smoke": Preset("cpu", ((Layer(48, 32), (64, 96)), (Layer(24, 200, 2), (64,))), 30.0, 2, ("torch",)),
}


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with status 2 and one line where it is wrong."""
    parser = Parser("benchmark_norms", description)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="instead of the layers below")
    parser.add_argument("--layers", nargs="+", metavar="PxD", help="d_in x d_out: 1024x1024 2048x128256")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rows", type=int, default=None, help="B")
    parser.add_argument("--dtype", choices=tuple(ALLOWED))
    parser.add_argument("--impls", nargs="+", choices=("torch", "triton", "auto"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="time budget; what does not fit into it is skipped, and says so")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=json_path)
    args = parser.parse_args(arguments)
    if args.preset and any(getattr(args, name) is not None for name in ("layers", "tokens", "rows", "dtype")):
        parser.error("--preset brings its own --layers, --tokens, --rows and --dtype; leave them out, or the preset")
    numbers = [args.rows, args.rounds, args.seconds, args.threads, *(args.tokens or [])]
    if any(n is not None and n <= 0 for n in numbers):
        parser.error(f"--rows, --rounds, --seconds, --threads and --tokens are above 0; got {numbers}")
    return args


def by_hand(args: argparse.Namespace) -> Preset:
    """The layers that the options name.

    Raises:
        ValueError: a layer that is not written PxD.
    """
    layers = []
    for text in args.layers or ["1024x1024"]:
        p, _, d = text.partition("x")
        if not (p.isdigit() and d.isdigit() and int(p) and int(d)):
            raise ValueError(f"--layers has {text!r}; expected d_in and d_out with an x between them, as 1024x4096")
        layers.append((Layer(int(p), int(d), args.rows or 1, args.dtype or "float32"), tuple(args.tokens or [1024])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Preset(device, tuple(layers), 3600.0, 5, ("torch", "triton") if device == "cuda" else ("torch",))
