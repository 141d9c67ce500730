"""The white-box audit: a private training whose releases are compared with what they are claimed to be, step by step.

    dataset, noted --> dpft.prepare, the loop of the README, plain SGD --> parameters before and after each step
         |                                                                      |
         v                                                                      v
    examples drawn --> their clipped gradients, one at a time (expected.py)   release = (before - after) b / rate
         |                                                                      |
         +------------------> release - sum of what was drawn = residual <------+
                                         |
                 in units of the claimed noise, with its correlation over the steps undone (units.py)
                                         |
                 must be N(0, 1) in every coordinate, independent over the steps, and nothing else (result.py)

The attacker knows everything but the noise and whether one canary was drawn. Nothing of the training is changed: the
releases are read off the parameters, which are all that a training lets out.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpft.audit.expected import Collate, ExpectedGradients, WatchedDataset, parameter_vector
from dpft.audit.result import Observations, WhiteBoxAudit, evaluate
from dpft.audit.units import Units
from dpft.errors import PrivacyConfigError
from dpft.prepare import prepare
from dpft.privacy import PrivacyConfig

# Small enough that the parameters hardly move; large enough that their rounding (2^-24) vanishes beside a step.
RATE = 1e-2
VOTE = "the count below the clip norm"  # a coordinate of the releases, where the clip norm adapts
KEPT = 4096  # coordinates whose residuals are kept for the tests of the law and of repeated noise


def white_box(
    make_accelerator: Callable[[], Any],
    model: nn.Module,
    dataset: Any,
    privacy: PrivacyConfig,
    *,
    collate_fn: Collate,
    steps: int = 300,
    canaries: int = 16,
    restart: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> WhiteBoxAudit:
    """Audit the mechanism: train for some steps, and test everything that the report claims of one release.

    The model is copied; it is trained with plain SGD in eval mode (dropout would make what is expected random). The
    run is a private one like any other, except that its number of steps is that of the audit. Give test data, or data
    that may be spent: the result contains values that depend on the data.

    Args:
        make_accelerator: returns a fresh ``accelerate.Accelerator``; called twice with ``restart``. Any engine that
            ``dpft.prepare`` takes; call this function on all ranks.
        model: a Hugging Face model with float32 parameters; small, as each drawn example is differentiated once more.
        dataset: as for ``dpft.prepare``.
        privacy: the configuration to audit; its noise multiplier, sample rate, clip norm, sampler and accountant.
        collate_fn: as for ``dpft.prepare``.
        steps: releases to observe.
        canaries: examples whose membership in each batch is attacked: the first of a random order.
        restart: save, make everything anew and load in the middle, so that a restart is audited too.
        seed: of the choice of canaries and coordinates; nothing else is seeded.
        say: called with one line of progress now and then.
        options: further arguments of ``dpft.prepare``, such as ``max_physical_batch_size``.

    Returns:
        What was found: see :class:`~dpft.audit.WhiteBoxAudit`.

    Raises:
        PrivacyConfigError: no noise is claimed, or the unit is a user.
        ValueError: parameters that are not float32, or a model without a loss.
        MissingPackageError: scipy or dp-accounting is not installed.
    """
    schedule = privacy.resolve(len(dataset))
    if schedule.noise_multiplier == 0 or schedule.unit != "example":
        raise PrivacyConfigError(
            f"noise_multiplier={schedule.noise_multiplier:g}, unit={schedule.unit!r}; an audit needs a claim to test: "
            "noise above 0, and the unit 'example'."
        )
    if wrong := {str(p.dtype) for p in model.parameters() if p.requires_grad} - {"torch.float32"}:
        raise ValueError(
            f"parameters are {sorted(wrong)}; expected float32: a release is read off the parameters, and would be "
            "rounded away in others. Audit model.float()."
        )
    claimed = dataclasses.replace(
        privacy, num_steps=steps, num_epochs=None, target_epsilon=None, noise_multiplier=schedule.noise_multiplier
    )
    rng = np.random.default_rng(seed)
    expected = ExpectedGradients(model, dataset, collate_fn, schedule)
    expected.of(0)  # what cannot be audited is found before anything is trained
    watched = WatchedDataset(dataset)
    chosen = rng.permutation(len(dataset))[:canaries].tolist()
    planned = claimed.resolve(len(dataset))
    sizes = dict(zip(expected.names, expected.sizes, strict=True))
    seen = Observations(
        schedule=planned,
        examples=len(dataset),
        parameters=sizes if planned.adaptive_clip is None else {**sizes, VOTE: 1},
        kept=np.sort(rng.permutation(sum(expected.sizes))[:KEPT]),
    )
    units = Units(planned)
    with tempfile.TemporaryDirectory(prefix="dpft-audit-") as scratch:
        parts = [steps // 2, steps - steps // 2] if restart and steps > 1 else [steps]
        for number, count in enumerate(parts):
            accelerator = make_accelerator()
            folder = Path(_from_all(scratch)[0])  # the first rank's, once there are ranks
            trained = copy.deepcopy(model).eval()
            optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=RATE)
            prepared, stepped, loader = prepare(
                accelerator,
                trained,
                optimizer,
                watched,
                claimed,
                collate_fn=collate_fn,
                ledger_path=folder / "ledger.jsonl",
                **options,
            )
            try:
                if number:
                    accelerator.load_state(str(folder / "checkpoint"))
                prepared.eval()
                seen.start()
                _observe(accelerator, prepared, stepped, loader, watched, expected, chosen, seen, units, count, say)
                if number + 1 < len(parts):
                    accelerator.save_state(str(folder / "checkpoint"))
            finally:
                loader.privacy.close()
        accelerator.wait_for_everyone()  # before the first rank removes the folder
    return evaluate(seen)


def _observe(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    watched: WatchedDataset,
    expected: ExpectedGradients,
    canaries: Sequence[int],
    seen: Observations,
    units: Units,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """The loop of a private training, with a note of what was drawn and what was released."""
    before = parameter_vector(model, expected.names)
    drawn: list[int] = []
    watched.taken()
    for batch in loader:
        asked = watched.taken()
        # For a physical batch without an example the loader asks for the first one, as a row of weight zero.
        drawn += asked if bool((batch["example_weight"] > 0).any()) or len(asked) > 1 else []
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        if not loader.is_last:
            continue
        after = parameter_vector(model, expected.names)
        everyone = sorted(index for part in _from_all(drawn) for index in part)
        release = (before - after) / RATE * float(seen.schedule.expected_batch_size)
        norm, next_norm = expected.clip_norm, loader.privacy.clip_norm
        expected.at(before)
        gradients = {}
        for index in {*everyone, *canaries}:
            gradient = expected.of(index)
            gradients[index] = units.contribution(gradient, expected.norm <= norm, norm)
        nothing = torch.zeros(sum(seen.parameters.values()), dtype=torch.float64)
        total = sum((gradients[index] for index in everyone), nothing)
        attacked = _attacked(gradients, canaries)
        vote = None
        if seen.schedule.adaptive_clip is not None and attacked:
            voter = list(attacked)[seen.steps % len(attacked)]
            vote = (voter, float(gradients[voter][-1]))
        seen.add(
            set(everyone),
            units.released.row(units.release(release, norm, next_norm)),
            units.expected.row(total),
            attacked,
            vote,
        )
        expected.clip_norm = next_norm
        before, drawn = after, []
        if seen.steps % 50 == 0:
            say(f"{seen.steps} releases observed")
        steps -= 1
        if steps == 0:
            return


def _attacked(gradients: dict[int, Tensor], canaries: Sequence[int]) -> dict[int, Tensor]:
    """For each canary the direction ``[d]`` in which it is looked for: its part that no other canary shares.

    Orthonormal directions make the noise in them independent. The direction is divided by what the canary contributes
    in it, so that a canary scores 1 where it was drawn, and noise 0 on average.
    """
    columns = torch.stack([gradients[i] for i in canaries], dim=1)
    directions, triangle = torch.linalg.qr(columns)
    own = triangle.diagonal()
    return {i: directions[:, k] / own[k] for k, i in enumerate(canaries) if abs(float(own[k])) > 1e-9}


def _from_all(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
