"""train_base_model.py: its command line."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.base_model.encoder import ENCODER
from tools.base_model.training import LLAMA, train
from tools.common.command_line import Parser

ROOT = Path(__file__).resolve().parents[2]


def main(description: str | None, argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = Parser("train_base_model", description)
    parser.add_argument("--encoder", action="store_true", help="a BERT, by masked tokens, instead of the Llama")
    parser.add_argument("--output", type=Path, help="folder to write (default: the one in recipes/assets)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the BPE (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=96, help="width (default %(default)s)")
    parser.add_argument("--intermediate", type=int, default=256, help="width inside the MLP (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers (default %(default)s)")
    parser.add_argument(
        "--heads", type=int, default=4, help="heads; half as many key-value heads (default %(default)s)"
    )
    parser.add_argument("--untied", action="store_true", help="give the output head weights of its own")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a training window (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="windows in a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; they change the rounding (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and windows (default %(default)s)")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command_line = [w for w in words if "output" not in w] if "--output" not in words else []
    if args.output is None:
        args.output = ROOT / "recipes" / "assets" / ("encoder" if args.encoder else "base_model")
    train(args, ENCODER if args.encoder else LLAMA)
