"""Mutations of correlated noise: values that are drawn twice, or noise whose covariance is not the accounted one."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

LAW = ("tests/test_correlated_noise.py",)

_NOISE = "dpft/correlated_noise.py"
_COUNTER = "np.array([0, number, self._place.number, step], np.uint64)"

CORRELATED_MUTATIONS = (
    Mutation(
        "correlated_step_repeated",
        "every step draws the same values",
        _NOISE,
        _COUNTER,
        _COUNTER.replace(", step]", ", 0]"),
        LAW,
    ),
    Mutation(
        "correlated_parameter_repeated",
        "every parameter gets the same values",
        _NOISE,
        _COUNTER,
        _COUNTER.replace("self._place.number", "0"),
        LAW,
    ),
    Mutation(
        "correlated_block_repeated",
        "every block of a parameter gets the same values",
        _NOISE,
        _COUNTER,
        _COUNTER.replace("number, self", "0, self"),
        LAW,
    ),
    Mutation(
        "correlated_shard_from_zero",
        "every shard of a parameter gets the values of the first",
        _NOISE,
        "BLOCK_ON_DEVICE, self._place",
        "BLOCK_ON_DEVICE, self._place._replace(start=0)",
        LAW,
    ),
    Mutation(
        "correlated_start_repeated",
        "a resumed run draws from the secret of the first start",
        _NOISE,
        "_Draws(secret.secret, place",
        "_Draws(self._secrets[0].secret, place",
        LAW,
    ),
    Mutation(
        "correlated_not_taken_back",
        "a step adds earlier noise again instead of taking it back",
        _NOISE,
        "noise.sub_(before, alpha=weight)",
        "noise.add_(before, alpha=weight)",
        LAW,
    ),
    Mutation(
        "correlated_earlier_forgotten",
        "a resumed run has no earlier noise to take back",
        _NOISE,
        "for step in range(secret.first, end):",
        "for step in range(end, end):",
        LAW,
    ),
)
