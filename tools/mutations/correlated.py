"""Mutations of correlated noise: values that are drawn twice, or noise whose covariance is not the accounted one."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

LAW = ("tests/test_correlated_noise.py",)
RESUME = ("tests/test_prepare_correlated.py",)

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
    Mutation(
        "correlated_buffers_forgotten",
        "the buffers of a BLT begin at zero after a resume",
        _NOISE,
        "for step in range(secret.first, end):",
        'for step in range(end if self.strategy.kind == "blt" else secret.first, end):',
        LAW,
    ),
    Mutation(
        "correlated_groups_drift",
        "an example's group comes a step earlier in each turn, nearer to its last step than the bands",
        "dpft/privacy/samplers/cyclic_samplers.py",
        "self._groups[step % self.cycle]",
        "self._groups[(step + step // self.cycle) % self.cycle]",
        ("tests/privacy/test_cyclic_samplers.py",),
    ),
    Mutation(
        "correlated_order_forgotten",
        "a resume may have the examples in another order, nearer to their earlier steps",
        "dpft/engines/correlated.py",
        "dataset_mark(dataset, run_id.encode())",
        '"any"',
        RESUME,
    ),
    Mutation(
        "correlated_number_forgotten",
        "a resume may have another number of examples, and so other groups",
        "dpft/engines/correlated.py",
        "str(len(dataset))",
        '"any"',
        RESUME,
    ),
    Mutation(
        "correlated_secret_missing",
        "the noise of a start whose secret is not in the file is drawn from another one's",
        "dpft/privacy/correlated/noise_secrets.py",
        "starts - set(firsts)",
        "starts - starts",
        LAW,
    ),
    Mutation(
        "correlated_parameters_in_float64",
        "the noise computes with roundings of the parameters whose sensitivity is accounted",
        "dpft/privacy/correlated/optimum.py",
        "nearest = values.astype(np.float32)",
        "nearest = values.astype(np.float64)",
        ("tests/privacy/test_correlated.py",),
    ),
)
