"""Mutations of users as examples, and of what they are compared with."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

_USERS, _UNITS, _GROUPS = "dpft/users.py", "dpft/privacy/accounting/units.py", "dpft/rules/groups.py"
USERS, UNITS, GROUPS = ("tests/test_users.py",), ("tests/privacy/test_units.py",), ("tests/clipping/test_groups.py",)

USER_MUTATIONS = (
    Mutation(
        "rows_by_place",
        "a user's rows follow from the user's place in the dataset",
        _USERS,
        "random.SystemRandom().sample(",
        "random.Random(user).sample(",
        USERS,
    ),
    Mutation(
        "rows_by_the_global_generator",
        "a user's rows follow from random.seed, and from all draws before",
        _USERS,
        "random.SystemRandom().sample(",
        "random.sample(",
        USERS,
    ),
    Mutation(
        "all_rows_of_a_user",
        "a step uses all rows of a user",
        _USERS,
        "if len(owned) <= self.rows:",
        "if True:",
        USERS,
    ),
    Mutation(
        "sum_for_mean",
        "the mean of a user's rows is asked for, and their sum is taken",
        _USERS,
        'if self._reduce == "mean" else {}',
        'if self._reduce == "sum" else {}',
        USERS,
    ),
    Mutation(
        "mean_over_the_most_rows",
        "the mean divides by the rows of the user who has most",
        _GROUPS,
        "sums / self.counts.to(sums.device)",
        "sums / self.most",
        GROUPS,
    ),
    Mutation(
        "users_clipped_row_by_row",
        "each row of a user is clipped to C by itself, and not the gradient of all of them",
        _USERS,
        "torch.arange(len(users)).repeat_interleave(counts)",
        "torch.arange(int(counts.sum()))",
        USERS,
    ),
    Mutation(
        "rows_for_users",
        "a recipe clips each record of a user apart, and a user is protected by the epsilon of one record",
        "recipes/finetune/data/users.py",
        "torch.arange(len(users)).repeat_interleave(counts)",
        "torch.arange(int(counts.sum()))",
        ("tests/recipes/test_users.py",),
    ),
    Mutation(
        "unit_user_of_users",
        "a dataset of users is taken for one of examples of users",
        _USERS,
        'if privacy.unit == "user":',
        "if False:",
        USERS,
    ),
    Mutation(
        "rows_as_users",
        "where rows are sampled a user is accounted for one of them",
        _UNITS,
        'of_rows = dataclasses.replace(of_users, unit="user", examples_per_user=most)',
        "of_rows = of_users",
        UNITS,
    ),
    Mutation(
        "rate_of_uncapped_rows",
        "rows beyond the cap make the rate smaller",
        _UNITS,
        "rate = batch / examples",
        "rate = batch / int(owned.sum())",
        UNITS,
    ),
)
