"""The training that kill_ranks.py kills: tiny, private, on examples whose gradients are exactly zero.

Since the clipped sum is zero, what the optimiser is given *is* the noise. It is written down, with everything else
that kill_ranks.py checks, in a file of this rank's own: appended to by one write, on the disk before training goes on,
and known to dpft in no way.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dpft
from accelerate import Accelerator

PAUSE = 120.0  # seconds that a rank waits, at an exact instant, to be killed
KEPT_CHECKPOINTS = 2


def use_cpu() -> None:
    """Let the ready configurations run on a CPU, which Accelerate by itself gets wrong without an error.

    The same as tests/engines/on_cpu.py, which is not for tools to import: gloo, and no extension of DeepSpeed's built.
    """
    torch.set_num_threads(1)
    gloo = ("gloo", DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda *_, **__: gloo
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


class Witness:
    """One rank's own record of what happened."""

    def __init__(self, folder: Path, rank: int, start: int, pause: str) -> None:
        self._file = os.open(folder / f"rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._start = start
        at, number, who = pause.split(":") if pause else ("", "0", "-1")
        self._pause = (at, int(number)) if int(who) == rank else None

    def tell(self, what: str, **fields: Any) -> None:
        """Write one line, and return when it is on the disk."""
        os.write(self._file, (json.dumps({"start": self._start, "what": what, **fields}) + "\n").encode())
        os.fsync(self._file)

    def pause(self, at: str, number: int) -> None:
        """Wait to be killed, if this is the instant."""
        if self._pause == (at, number):
            self.tell("paused", number=number)
            time.sleep(PAUSE)
            raise SystemExit(f"nobody killed rank {os.environ.get('RANK')} at {at}")


class WitnessedAdamW(torch.optim.AdamW):
    """AdamW that says what it is given before it changes a parameter. A private training needs no more than that."""

    witness: Witness | None = None
    number = 0  # of the release in this start

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One call a release; under ZeRO-3 one for each flat partition."""
        if self.witness is not None:
            given = [_local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
            noise = [base64.b64encode(g.float().cpu().numpy().tobytes()).decode() for g in given if g.numel()]
            self.witness.tell("release", number=self.number, noise=noise)
            self.witness.pause("ledger", self.number)  # the ledger counts the release, the parameters are as before
        result = super().step(closure)
        if self.witness is not None:
            self.witness.pause("changed", self.number)
        return result


def _local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().reshape(-1)


class Silent:
    """Examples without any label: their losses and gradients are zero."""

    def __init__(self, count: int, tokens: int = 8) -> None:
        self.ids = torch.randint(3, 32, (count, tokens), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": torch.full_like(ids, -100)}


def build() -> nn.Module:
    """A Llama of some 5,000 parameters, the same on every rank."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)).train()


def digest(accelerator: Accelerator, model: nn.Module) -> str:
    """Of the whole parameters, on the ranks that the engine gathers them on; elsewhere the empty string."""
    state = accelerator.get_state_dict(model)
    if not state:
        return ""
    sums = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        sums.update(name.encode() + state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return sums.hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, oldest first."""
    return sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Under another name until all ranks have written it to its end."""
    partial = folder / f"partial_step_{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(folder / f"step_{step}")
        for old in checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--privacy", type=json.loads, required=True)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--start", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--stop-after", type=int, default=0, help="releases of this start; 0: the plan's")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--pause", default="", help="ledger:2:1 has rank 1 wait to be killed within its 2nd release")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        use_cpu()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.timeout))])
    if args.cpu and accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False  # it is compiled
    witness = Witness(args.folder, accelerator.process_index, args.start, args.pause)
    witness.tell("up", pid=os.getpid())
    model = build()
    inner = WitnessedAdamW(model.parameters(), lr=1e-3)
    states = args.folder / "checkpoints"
    last = next(reversed(checkpoints(states)), None)
    model, optimizer, loader = dpft.prepare(
        accelerator,
        model,
        inner,
        Silent(args.examples),
        dpft.PrivacyConfig.from_dict(args.privacy),
        max_physical_batch_size=2,
        ledger_path=args.folder / "ledger.jsonl",
        continue_ledger=last is None,  # killed before the first checkpoint: the model starts anew, the count does not
    )
    run = loader.privacy
    if last is not None:
        accelerator.load_state(str(last))
    facts = {"count": run.steps, "epsilon": run.epsilon(exact=True), "digest": digest(accelerator, model)}
    witness.tell("ready", **facts, loaded=None if last is None else int(last.name.removeprefix("step_")))
    inner.witness, inner.number = witness, 1
    for batch in loader:
        witness.tell("backward", number=inner.number)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if not loader.is_last:
            continue
        if run.steps % args.save_every == 0:
            witness.tell("saving", number=inner.number, step=run.steps, digest=digest(accelerator, model))
            save(accelerator, states, run.steps)
            witness.tell("saved", step=run.steps)
        if inner.number == args.stop_after:
            break
        inner.number += 1
    witness.tell("end", count=run.steps, epsilon=run.epsilon(exact=True))
    accelerator.end_training()


if __name__ == "__main__":
    main()
