"""The mechanism of one release, as the accountant sees it: the sampler, its constants, and the noise multiplier.

A :class:`Mechanism` is the part of the configuration that determines the privacy cost of one release. The accountant
computes with it, the ledger stores it, and nothing else about a run changes the epsilon.

One release is ``sum of clipped gradients of the sampled examples + N(0, (noise_multiplier * max_grad_norm)^2 I)``.
One example changes the sum by at most ``max_grad_norm`` =: C when it is added or removed, under both clip functions:
Abadi's ``min(1, C / n) * n <= C`` and the automatic ``C / (n + gamma) * n < C`` (n: the norm of its gradient). When it
is *replaced* the sum can change by 2 C.

An example may have several rows, and a user with all of them may be one (:mod:`dpft.users`): what is clipped is the
gradient of the whole. Which of its rows are used may be drawn afresh at each step, independently of everything else:
every theorem below holds with these draws fixed, and so without them.

Neither of the two options of the clip norm changes the mechanism; what each asks of the noise and why is in one place:

- ``adaptive_clip`` (:mod:`dpft.privacy.adaptive_clip`): the sum has the noise multiplier
  ``schedule.sum_noise_multiplier`` and a count the deviation ``schedule.count_noise``; together they are one Gaussian
  mechanism of ``noise_multiplier`` on vectors of one dimension more (Andrew et al. 2021, arXiv 1905.03871, Theorem 1).
  For every row below but ``unit user`` and ``shuffle``, where it is refused.
- ``clip_groups`` (``dpft/clipping/clip_groups.py``): parts of a gradient are clipped to C_g with ``sum C_g^2 = C^2``,
  so that the sensitivity is C in every row; all parts get the same noise (McMahan et al. 2018, arXiv 1710.06963).

===================  ==================  ===========  ================================================================
sampler              adjacency           sensitivity  theorem
===================  ==================  ===========  ================================================================
poisson              add or remove one   C            Zhu, Dong, Wang 2022 (arXiv 2106.08567), Theorem 11; PLD by
                                                      connect-the-dots, Doroshenko et al. 2022 (arXiv 2207.04380); RDP:
                                                      Mironov, Talwar, Zhang 2019 (arXiv 1908.10530)
poisson, unit user   add or remove the   up to k C    mixture of Gaussians, Choquette-Choo et al. 2023
                     user                             (arXiv 2310.15526); RDP of the same pairs:
                                                      :mod:`dpft.privacy.accounting.renyi`
truncated_poisson    add or remove one   C, or 2 C    arXiv 2508.15089 (dp_accounting's TruncatedSubsampledGaussian);
                                         if cut       RDP of the same pairs, as above
fixed_size           replace one         2 C          Wang, Balle, Kasiviswanathan 2019 (arXiv 1808.00087), Theorem 27
shuffle              zero out one        C            parallel composition within an epoch (McSherry 2009,
                                                      "Privacy integrated queries"; adaptive by fixing the
                                                      permutation), Gaussians over the epochs
                                                      (Dong, Roth, Su 2019, arXiv 1905.02383, Corollary 3.3)
balls_and_bins       zero out one        C            the pair of Chua et al. 2024 (arXiv 2412.16802), which dominates
                                                      an epoch adaptively; PLD by sums that grow in the convex order:
                                                      :mod:`dpft.privacy.accounting.allocation` has the proof
cyclic_poisson       zero out one        C            Choquette-Choo et al. 2023 (arXiv 2306.08153), Theorem 4: with b
(bandmf)                                              bands, t releases cost what ceil(t / b) Poisson-sampled Gaussian
                                                      releases do, each accounted as those of ``poisson``
fixed_order          zero out one        C s          one Gaussian release of all steps, s the sensitivity of C x under
(blt)                                                 participations b apart: Kalinin & Lampert 2024 (arXiv
                                                      2405.13763), Theorem 2; adaptive steps: Denisov et al. 2022
                                                      (arXiv 2202.08312), Theorem 2.1
===================  ==================  ===========  ================================================================

The last two have noise that is correlated over the steps (:mod:`dpft.privacy.correlated`): the released sums of t
steps are ``C x + z``, and z has the standard deviation ``noise_multiplier * max_grad_norm * strategy.scale``. So a
noise multiplier means what it means elsewhere: the noise over the most by which one example can change what is
composed.

- ``cyclic_poisson``: each example belongs to one of b groups, by a fixed function of its index and the number of
  examples, never of its content, and is drawn with probability q at the steps t = group modulo b, at no other. C has
  b bands, so the b rows of ``C x + z`` that one such step affects are affected by no other of them: given the rows
  before, they are one release with sensitivity C |c|, sampled with probability q.
- ``fixed_order``: the batches are fixed, and come round every b = ceil(N / batch size) steps. No amplification, and no
  secret.

What these theorems need of a resume is that the steps go on counting, that no noise is drawn twice, and that the
examples keep their number and their order.

What is not a training step, and pays from an account (:mod:`dpft.privacy.account`); h: half the range to which the
value of a record is clipped. The adjacency is the account's. The sensitivities are those of add/remove and zero-out;
twice these for ``replace_one``, k times these for the unit user.

===================  ===========  ====================================================================================
release              sensitivity  theorem
===================  ===========  ====================================================================================
private mean         h            Gaussian mechanism: ``poisson`` at sample rate 1 (``replace_one``: ``fixed_size`` of
                                  all records); on whole numbers: :mod:`dpft.scalar_noise`
early stopping       h            AboveThreshold: Dwork, Roth 2014, Algorithm 1, Theorem 3.23, on whole numbers; in PLD
                                  and RDP by its dominating pair, randomised response (Kairouz, Oh, Viswanath 2015,
                                  arXiv 1311.0776)
counts               1, in L1     Laplace mechanism: Dwork, Roth 2014, Theorem 3.6, discrete; then as early stopping
best of K trials     a trial's    Papernot, Steinke 2022 (arXiv 2110.03620), Theorem 2 (truncated negative binomial),
                                  Theorem 6 (Poisson); RDP
all of an account    -            chosen by results: Renyi filter of a fixed order, Feldman, Zrnic 2021 (arXiv
                                  2008.11193), Theorem 3.1, interleaved: Haney et al. 2023 (arXiv 2309.05901); fixed
                                  beforehand: composition of PLDs
===================  ===========  ====================================================================================

A training with correlated noise is one entry of an account, whatever its starts are, and is reserved whole. If it ends
before its last step, it counts with the steps that it made:

- with ``rdp`` also where results decided when. The theorem asks that, for each pair of neighbours, the Renyi
  divergences of the single releases, each given those before it, add up to the budget at most. For ``fixed_order``,
  row t of ``C x + z`` is, given the rows before, a Gaussian whose mean an example moves by the columns of its own
  steps up to t: their squares up to any stop add up to those of the leading block for that example, which is at most
  the sensitivity that is counted. For ``cyclic_poisson`` each round of b rows that has begun is one sampled Gaussian.
- with ``pld`` only where they did not, as for every use of such an account.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dpft.errors import AccountingError, PrivacyConfigError
from dpft.privacy.correlated.strategy import Strategy

SamplerName = Literal[
    "poisson", "truncated_poisson", "fixed_size", "shuffle", "balls_and_bins", "cyclic_poisson", "fixed_order"
]
AccountantName = Literal["pld", "rdp"]
UnitName = Literal["example", "user"]
AdjacencyName = Literal["add_or_remove_one", "replace_one", "zero_out"]

SAMPLERS: tuple[str, ...] = get_args(SamplerName)

# Their theorem is about whole epochs: one that has begun counts whole, and every start of a run begins one.
EPOCH_SAMPLERS = frozenset({"shuffle", "balls_and_bins"})

# The constants that each sampler's theorem uses. The others must be None, so that equal mechanisms compare equal, and
# so that the number of examples is not stored where it need not be public.
_NEEDS: dict[str, frozenset[str]] = {
    "poisson": frozenset({"sample_rate"}),
    "truncated_poisson": frozenset({"sample_rate", "max_batch_size", "dataset_size"}),
    "fixed_size": frozenset({"batch_size", "dataset_size"}),
    "shuffle": frozenset({"batch_size", "dataset_size"}),
    "balls_and_bins": frozenset({"batch_size", "dataset_size"}),
    "cyclic_poisson": frozenset({"sample_rate", "strategy"}),
    "fixed_order": frozenset({"batch_size", "dataset_size", "strategy"}),
}
_ADJACENCY: dict[str, AdjacencyName] = {
    "poisson": "add_or_remove_one",
    "truncated_poisson": "add_or_remove_one",
    "fixed_size": "replace_one",
    "shuffle": "zero_out",
    "balls_and_bins": "zero_out",
    "cyclic_poisson": "zero_out",
    "fixed_order": "zero_out",
}
RATED = tuple(name for name, needs in _NEEDS.items() if "sample_rate" in needs)
WITHOUT_N = tuple(name for name, needs in _NEEDS.items() if "dataset_size" not in needs)
# The one kind of correlated noise for which a sampler's participations are accounted.
STRATEGY_OF: dict[str, str] = {"cyclic_poisson": "bandmf", "fixed_order": "blt"}


def check_unit(unit: str, examples_per_user: int | None) -> None:
    """Refuse users without a bound on their examples, and a bound without users.

    Raises:
        PrivacyConfigError: one without the other.
    """
    if (unit == "user") != (examples_per_user is not None):
        raise PrivacyConfigError(
            f"unit={unit!r} with examples_per_user={examples_per_user!r}; give examples_per_user (an upper bound that "
            "the data really keeps) exactly when unit='user'."
        )


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The constants of one release.

    Attributes:
        sampler: how the logical batch is drawn.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm`` (times ``strategy.scale``); 0 means
            not private.
        sample_rate: probability q of each example, in (0, 1]; ``poisson`` and ``truncated_poisson``; of each example
            of the step's group, ``cyclic_poisson``.
        batch_size: examples per logical batch (``balls_and_bins``: on average); not for Poisson samplers.
        max_batch_size: cap on the logical batch; ``truncated_poisson`` only.
        dataset_size: number of examples N; only where the theorem treats it as public.
        unit: the privacy unit, one person's data: ``example`` or ``user``.
        examples_per_user: upper bound k on the examples of one user; ``unit="user"`` only.
        strategy: of noise that is correlated over the steps; ``cyclic_poisson`` and ``fixed_order`` only.

    Raises:
        PrivacyConfigError: a constant is missing, superfluous or out of range.
        AccountingError: unit ``user`` with a sampler for which no theorem is implemented.
    """

    sampler: SamplerName
    noise_multiplier: float
    sample_rate: float | None = None
    batch_size: int | None = None
    max_batch_size: int | None = None
    dataset_size: int | None = None
    unit: UnitName = "example"
    examples_per_user: int | None = None
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise PrivacyConfigError(f"sampler={self.sampler!r}; expected one of {', '.join(SAMPLERS)}.")
        for name in ("sample_rate", "batch_size", "max_batch_size", "dataset_size", "strategy"):
            came, needed = getattr(self, name), name in _NEEDS[self.sampler]
            if needed and came is None:
                raise PrivacyConfigError(f"sampler={self.sampler!r} needs {name}, which is None; give it.")
            if not needed and came is not None:
                raise PrivacyConfigError(f"sampler={self.sampler!r} takes no {name}, but got {came!r}; leave it out.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyConfigError(f"noise_multiplier={self.noise_multiplier!r}; expected a finite number >= 0.")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise PrivacyConfigError(f"sample_rate={self.sample_rate!r}; expected a probability in (0, 1].")
        for name in ("batch_size", "max_batch_size", "dataset_size", "examples_per_user"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise PrivacyConfigError(f"{name}={value!r}; expected a whole number >= 1.")
            object.__setattr__(self, name, int(value))  # which a ledger can hold
        if self.batch_size is not None and self.dataset_size is not None and self.batch_size > self.dataset_size:
            raise PrivacyConfigError(
                f"batch_size={self.batch_size} is larger than the {self.dataset_size} examples of the dataset; "
                "lower expected_batch_size."
            )
        check_unit(self.unit, self.examples_per_user)
        if self.unit == "user" and self.sampler != "poisson":
            raise AccountingError(
                f"unit='user' with sampler={self.sampler!r}: dpft implements a theorem for users (mixture of "
                "Gaussians) only with Poisson sampling; use sampler='poisson', or unit='example'."
            )
        if self.strategy is not None:
            self._check_strategy(self.strategy)

    def _check_strategy(self, strategy: Strategy) -> None:
        if strategy.kind != STRATEGY_OF[self.sampler]:
            raise AccountingError(
                f"sampler={self.sampler!r} with correlated noise of kind {strategy.kind!r}: no theorem is implemented "
                f"for them together; expected {STRATEGY_OF[self.sampler]!r}."
            )
        if self.batch_size is not None and self.dataset_size is not None:
            apart = math.ceil(self.dataset_size / self.batch_size)
            if strategy.min_separation > apart:
                raise AccountingError(
                    f"the correlated noise was made for participations {strategy.min_separation} steps apart, and "
                    f"batches of {self.batch_size} of {self.dataset_size} examples come round every {apart} steps; "
                    f"make it for {apart}."
                )

    @property
    def adjacency(self) -> AdjacencyName:
        """The adjacency: which two datasets are neighbours."""
        return _ADJACENCY[self.sampler]

    @property
    def sensitivity(self) -> str:
        """The most by which one unit changes the clipped sum, in words, with C = ``max_grad_norm``."""
        if self.unit == "user":
            return f"up to {self.examples_per_user} C (mixture of Gaussians)"
        if self.strategy is not None:
            times = f"{self.strategy.scale:.6g} C"
            if self.strategy.kind == "bandmf":
                return f"{times} in C x for each participation, which are {self.strategy.min_separation} steps apart"
            return f"{times} in C x over all steps, {self.strategy.participations} participations"
        return {"truncated_poisson": "C, or 2 C where the batch is cut", "fixed_size": "2 C"}.get(self.sampler, "C")

    @property
    def steps_per_epoch(self) -> int | None:
        """Logical batches per epoch, N / b rounded up; None where the sampler has no epochs."""
        if self.sampler not in EPOCH_SAMPLERS or self.dataset_size is None or self.batch_size is None:
            return None
        return math.ceil(self.dataset_size / self.batch_size)

    def with_noise(self, noise_multiplier: float) -> Mechanism:
        """The same mechanism with another noise multiplier."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; constants that do not apply are left out."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return values if self.strategy is None else {**values, "strategy": self.strategy.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mechanism:
        """Inverse of :meth:`to_dict`.

        Raises:
            PrivacyConfigError: a key is unknown, missing, or its value out of range.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise PrivacyConfigError(
                f"unknown mechanism keys {sorted(unknown)}; they may come from a newer dpft: use that version."
            )
        try:
            strategy = values.get("strategy")
            return cls(**{**values, "strategy": None if strategy is None else Strategy.from_dict(strategy)})
        except TypeError as error:
            raise PrivacyConfigError(f"not a mechanism: {dict(values)!r} ({error}).") from error
