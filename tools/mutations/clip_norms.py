"""Mutations of clip norms that adapt, of clip groups, and of the automatic clip function's bound."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

ADAPTIVE = ("tests/test_adaptive_clip.py", "tests/privacy/test_adaptive_clip.py", "tests/clipping/test_clip_count.py")
GROUPS = ("tests/clipping/test_clip_groups.py",)

_RUN, _GROUPWISE = "dpft/run.py", "dpft/clipping/groupwise.py"

CLIP_NORM_MUTATIONS = (
    Mutation(
        "count_for_free",
        "the sum gets no more noise for the count that is released with it",
        "dpft/prepare.py",
        "noise_multiplier=schedule.sum_noise_multiplier",
        "noise_multiplier=schedule.noise_multiplier",
        ADAPTIVE,
    ),
    Mutation(
        "votes_smaller_than_they_are",
        "a vote is taken for a quarter, and not for a half",
        "dpft/privacy/adaptive_clip.py",
        "(2 * std) ** -2",
        "(4 * std) ** -2",
        ADAPTIVE,
    ),
    Mutation(
        "exact_count",
        "the count is released without noise",
        _RUN,
        "noised = grid.noised(int(total) * grid.steps) / 2",
        "noised = total / 2",
        ADAPTIVE,
    ),
    Mutation(
        "noise_of_the_first_clip_norm",
        "the noise keeps the deviation of the first release",
        _RUN,
        "        self.optimizer.max_grad_norm = norm\n",
        "",
        ADAPTIVE,
    ),
    Mutation(
        "votes_of_an_abandoned_batch",
        "examples vote whose gradients are not in the sum",
        _RUN,
        "        self._state.count = ClipCount()\n",
        "        self._state.count = self._state.count or ClipCount()\n",
        ADAPTIVE,
    ),
    Mutation(
        "clip_norm_of_the_schedule",
        "a resume forgets how the clip norm had adapted",
        _RUN,
        "self.schedule.max_grad_norm if norm is None else norm",
        "self.schedule.max_grad_norm",
        ADAPTIVE,
    ),
    Mutation(
        "each_group_to_c",
        "every group is clipped to the whole clip norm",
        "dpft/clipping/state.py",
        "self.rule.max_grad_norm * self.clip_groups.shares[group]",
        "self.rule.max_grad_norm",
        GROUPS,
    ),
    Mutation(
        "late_gradients_of_a_group",
        "a gradient that comes after its group was weighted is added without a factor of its own",
        _GROUPWISE,
        "if self._complete[self._clip_groups.of[key]]:",
        "if False:",
        GROUPS,
    ),
    Mutation(
        "inputs_scaled_for_another_group",
        "a layer beside another takes the input that was scaled by that one's factors",
        _GROUPWISE,
        "all_finite(sq), InputCache())",
        "all_finite(sq), self._inputs)",
        GROUPS,
    ),
    Mutation(
        "groups_delivered_before_the_check",
        "groups reach .grad before it is known that examples are not mixed",
        "dpft/clipping/strategies.py",
        "engine is None and job.probe is None and",
        "engine is None and",
        GROUPS,
    ),
    Mutation(
        "gamma_of_any_size",
        "the factors of small gradients leave the range of float32",
        "dpft/clipping/factors.py",
        "self.gamma < max(1.0, self.max_grad_norm) / LARGEST_NORM",
        "False",
        ("tests/clipping/test_sensitivity.py",),
    ),
)
