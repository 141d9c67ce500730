"""Mutations of accounts, private figures, early stopping and tuning: each spends more than the account says."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

ACCOUNT = ("tests/privacy/test_account.py",)
EVENTS = ("tests/privacy/test_account_events.py",)
EVALUATION = ("tests/test_evaluation.py",)
TUNING = ("tests/test_tuning.py",)
PAYING = ("tests/test_prepare_account.py",)

_ACCOUNT, _FILE = "dpft/privacy/account/account.py", "dpft/privacy/account/file.py"
_EVENTS, _FILTER = "dpft/privacy/account/events.py", "dpft/privacy/account/filter.py"
_EVALUATION, _TUNING = "dpft/evaluation.py", "dpft/tuning.py"

ACCOUNT_MUTATIONS = (
    Mutation(
        "account_admits_everything",
        "what does not fit is admitted",
        _ACCOUNT,
        "        if self._fits([*others, *uses]):\n            return",
        "        return",
        ACCOUNT,
    ),
    Mutation(
        "account_forgets_others",
        "only the new use is compared with the budget",
        _ACCOUNT,
        "self._fits([*others, *uses]):",
        "self._fits(uses):",
        ACCOUNT,
    ),
    Mutation(
        "account_frees_the_open",
        "a reservation counts only once it is finished",
        _ACCOUNT,
        "for entry in content.entries if entry.name != name for",
        "for entry in content.entries if entry.name != name and not entry.open for",
        ACCOUNT,
    ),
    Mutation(
        "account_unlocked",
        "two processes check the budget at once",
        _FILE,
        "fcntl.flock(fd, fcntl.LOCK_EX)",
        "pass",
        ACCOUNT,
    ),
    Mutation(
        "account_damage_ignored",
        "a damaged line is passed over",
        _FILE,
        "if line is None and raw.endswith(_TORN):",
        "if line is None:",
        ACCOUNT,
    ),
    Mutation(
        "account_gap_ignored",
        "a line that is gone is not missed",
        _FILE,
        ' or line["n"] != count',
        "",
        ACCOUNT,
    ),
    Mutation(
        "account_settles_the_living",
        "a run that is still going is settled",
        _ACCOUNT,
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        ACCOUNT + PAYING,
    ),
    Mutation(
        "account_old_ledger",
        "an old copy of a ledger takes the place of the newer count",
        _ACCOUNT,
        "less(released, before.uses)",
        "less(uses, before.uses)",
        ACCOUNT,
    ),
    Mutation(
        "account_adjacency_mixed",
        "releases of another adjacency are composed",
        _EVENTS,
        "if mechanism.adjacency != protects.adjacency and not as_zero_out:",
        "if False:",
        ACCOUNT,
    ),
    Mutation(
        "account_unit_mixed",
        "releases for another unit are composed",
        _EVENTS,
        "if (mechanism.unit, mechanism.examples_per_user) != (protects.unit, protects.examples_per_user):",
        "if False:",
        ACCOUNT,
    ),
    Mutation(
        "selection_as_one_trial",
        "the best of many trials costs as much as one",
        _EVENTS,
        "event = events.RepeatAndSelectDpEvent(inner, release.trials, shape)",
        "event = inner",
        EVENTS,
    ),
    Mutation(
        "pure_release_twice_as_good",
        "half of a pure release's epsilon is counted in Renyi DP",
        _EVENTS,
        "math.exp(release.epsilon)",
        "math.exp(release.epsilon / 2)",
        EVENTS,
    ),
    Mutation(
        "filter_conversion",
        "the Renyi budget lacks the cost of the conversion to (epsilon, delta)",
        _FILTER,
        " + math.log(self.delta * alpha) / (alpha - 1)",
        "",
        EVENTS,
    ),
    Mutation(
        "odometer_without_tail",
        "the odometer takes the Renyi sum for the loss",
        _FILTER,
        "total + math.log(1 / self.delta) / (self.order - 1)",
        "total",
        EVENTS,
    ),
    Mutation(
        "figure_not_clipped",
        "a record's value is not clipped",
        _EVALUATION,
        "min(half, max(-half, v - middle))",
        "v - middle",
        EVALUATION,
    ),
    Mutation(
        "figure_less_noise",
        "the noise of a figure is that of a smaller range",
        _EVALUATION,
        "    std = noise_multiplier * half",
        "    std = noise_multiplier * half / 2",
        EVALUATION,
    ),
    Mutation(
        "figure_of_users_as_of_examples",
        "a figure for users is paid as one for examples",
        _EVALUATION,
        "        unit=protects.unit,\n        examples_per_user=protects.examples_per_user,",
        "",
        EVALUATION,
    ),
    Mutation(
        "figure_before_payment",
        "a figure is released and then paid for",
        _EVALUATION,
        "    paid = account.spend([(mechanism, 1)], what)\n    std = noise_multiplier * half\n"
        "    noisy = float(GaussianNoise(secure=True).add_(torch.tensor([total], dtype=torch.float64), std))",
        "    std = noise_multiplier * half\n"
        "    noisy = float(GaussianNoise(secure=True).add_(torch.tensor([total], dtype=torch.float64), std))\n"
        "    paid = account.spend([(mechanism, 1)], what)",
        EVALUATION,
    ),
    Mutation(
        "stop_less_noise",
        "early stopping adds the threshold's noise to the questions",
        _EVALUATION,
        "self._laplace(2 * self._scale)",
        "self._laplace(self._scale)",
        EVALUATION,
    ),
    Mutation(
        "stop_replaced_records",
        "early stopping under replace-one has the sensitivity of add/remove",
        _EVALUATION,
        '(2 if protects.adjacency == "replace_one" else 1)',
        "1",
        EVALUATION,
    ),
    Mutation(
        "stop_again",
        "early stopping says stop more than once",
        _EVALUATION,
        "        if self.stopped:",
        "        if False:",
        EVALUATION,
    ),
    Mutation(
        "trials_poisson",
        "the number of trials is not drawn by the law that is accounted",
        _TUNING,
        'if distribution == "poisson":',
        "if True:",
        TUNING,
    ),
    Mutation(
        "trial_unbounded",
        "a trial may release more than was declared",
        _TUNING,
        "if count > self._declared[release]:",
        "if False:",
        TUNING,
    ),
    Mutation(
        "tune_paid_after",
        "a search is not paid for before its trials",
        _TUNING,
        "    account.spend(uses, what)\n",
        "",
        TUNING,
    ),
    Mutation(
        "tune_keeps_losers",
        "the files of other trials are kept",
        _TUNING,
        "            shutil.rmtree(loser)",
        "            pass",
        TUNING,
    ),
    Mutation(
        "run_not_reserved",
        "a training does not reserve its releases",
        "dpft/run.py",
        "            account.reserve(ledger.run_id, self._history, planned, ledger.path)",
        "            pass",
        PAYING,
    ),
    Mutation(
        "run_history_not_reserved",
        "a resumed training reserves only what is left of it",
        "dpft/engines/shared_account.py",
        "uses = [*released, planned]",
        "uses = [planned]",
        PAYING,
    ),
    Mutation(
        "ledger_leaves_its_account",
        "a training goes on without the account that it began with",
        "dpft/engines/shared_ledger.py",
        "        if payer != account:",
        "        if False:",
        PAYING,
    ),
)
