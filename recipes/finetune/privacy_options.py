"""The options of all recipes that say what is protected, and how: all that changes the privacy, and the account."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.option import option

# The names of dpft.PrivacyConfig, which says what goes together.
MECHANISMS: tuple[str, ...] = ("dp_sgd", "bandmf", "blt")
SAMPLERS: tuple[str, ...] = ("poisson", "truncated_poisson", "balls_and_bins", "fixed_size", "shuffle")
SAMPLERS += ("cyclic_poisson", "fixed_order")
SAMPLER_OF = {"dp_sgd": "poisson", "bandmf": "cyclic_poisson", "blt": "fixed_order"}
OTHERS = "others"  # of --clip-groups: the parameters that no other group has


@dataclass
class PrivacyOptions:
    """The options of the group "privacy"."""

    target_epsilon: float | None = option(
        8.0, "privacy", "epsilon to spend in the whole run; the noise is calibrated to it", metavar="EPSILON"
    )
    target_delta: float = option(1e-6, "privacy", "delta; well below one over the number of examples", metavar="DELTA")
    noise_multiplier: float | None = option(
        None,
        "privacy",
        "noise in units of the clip norm, instead of a target epsilon; 0 is not private",
        metavar="SIGMA",
    )
    max_grad_norm: float = option(
        1.0, "privacy", "clip norm C of an example's gradient over all parameters", metavar="C"
    )
    expected_batch_size: float = option(
        512,
        "privacy",
        "expected size B of a logical batch; each of N examples is included independently with probability B / N",
        metavar="B",
    )
    num_steps: int | None = option(
        None,
        "privacy",
        "logical batches, each one noisy update; if neither they nor epochs are given, as many as the demonstration",
        also=("max_steps",),
    )
    num_epochs: float | None = option(
        None, "privacy", "instead of steps: expected passes over the data", also=("num_train_epochs",)
    )
    mechanism: str = option(
        "dp_sgd",
        "privacy",
        "dp_sgd: independent noise. bandmf (with --bands) and blt (with --buffers): noise that is correlated over the "
        "steps, of which later steps take a part back",
        choices=MECHANISMS,
    )
    bands: int | None = option(
        None,
        "privacy",
        "of bandmf: bands b. An example can be drawn at every b-th step only, with b times the probability; b - 1 "
        "vectors of the size of the trained parameters are kept",
        metavar="B",
    )
    buffers: int | None = option(
        None, "privacy", "of blt: vectors of that size that are kept; 2 to 4 are enough", metavar="N"
    )
    sampler: str | None = option(
        None,
        "privacy",
        "how a logical batch is drawn; if not given, poisson, of bandmf cyclic_poisson, of blt fixed_order, which are "
        "the only ones of these two",
        choices=SAMPLERS,
    )
    max_batch_size: int | None = option(
        None, "privacy", "of truncated_poisson: the size at which a logical batch is cut", metavar="B"
    )
    accountant: str = option(
        "pld", "privacy", "pld, the tighter one, or rdp, the only one for fixed_size", choices=("pld", "rdp")
    )
    adaptive_clip: float | None = option(
        None,
        "privacy",
        "share of the examples that are to stay unclipped, such as 0.5: C then follows that quantile of the norms, "
        "from --max-grad-norm on, within the same epsilon",
        metavar="QUANTILE",
    )
    adaptive_clip_rate: float | None = option(
        None, "privacy", "of --adaptive-clip: how fast C moves; 0.2 if not given", metavar="RATE"
    )
    adaptive_clip_noise: float | None = option(
        None,
        "privacy",
        "of --adaptive-clip: standard deviation of the noise on the count of clipped examples; if not given, one with "
        "which the sum gets at most half a percent more noise",
        metavar="EXAMPLES",
    )
    clip_groups: str | None = option(
        None,
        "privacy",
        "clip parts of a gradient apart, to C together: layer, or weights by the beginnings of parameters' names, "
        f"such as model.embed_tokens=1,{OTHERS}=3",
        metavar="GROUPS",
    )
    account: str | None = option(
        None,
        "privacy",
        "file of a dpft.Account of these records (dpft account create): the run pays from its budget, or is refused",
        metavar="FILE",
    )
    secure_rng: bool = option(
        False,
        "privacy",
        "noise from a cryptographic generator, hardened against floating-point attacks",
        also=("secure_noise",),
    )
    tuning_note: str | None = option(
        None,
        "privacy",
        "for the card: how the hyperparameters were chosen, which the epsilon does not account for",
        metavar="TEXT",
    )

    audit: int = option(
        0,
        "privacy",
        "random canary records, each added with probability 1/2 and looked for in the final model: a lower bound of "
        "epsilon for the card. It grows with their number; a thousand prove at most 5.4. 0: no audit",
        metavar="CANARIES",
    )

    def __post_init__(self) -> None:
        """Refuse what has no meaning in a recipe. ``dpft.PrivacyConfig`` refuses everything else.

        Raises:
            ValueError: with the option's name.
        """
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            raise ValueError(
                f"got both --target-epsilon {self.target_epsilon:g} and --noise-multiplier {self.noise_multiplier:g}; "
                "one follows from the other. Give one of them."
            )
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"got both --num-steps {self.num_steps} and --num-epochs {self.num_epochs:g}; give one of them."
            )
        for name in ("adaptive_clip_rate", "adaptive_clip_noise"):
            if getattr(self, name) is not None and self.adaptive_clip is None:
                raise ValueError(f"--{name.replace('_', '-')} is of --adaptive-clip QUANTILE; give both or neither.")
        self.groups()
        if self.account is not None and not self.account.strip():
            raise ValueError("--account is empty; expected the file of an account.")

    @property
    def chosen_sampler(self) -> str:
        """The sampler, which follows from the mechanism if it was not given."""
        return self.sampler or SAMPLER_OF[self.mechanism]

    def groups(self) -> str | dict[str, float] | None:
        """``--clip-groups`` as ``dpft.PrivacyConfig`` takes it.

        Raises:
            ValueError: a part is no name and number.
        """
        if self.clip_groups is None or self.clip_groups == "layer":
            return self.clip_groups
        found: dict[str, float] = {}
        for part in self.clip_groups.split(","):
            name, _, weight = (word.strip() for word in part.rpartition("="))
            name = "" if name == OTHERS else name
            try:
                if name in found or "=" not in part:
                    raise ValueError
                found[name] = float(weight)
            except ValueError:
                raise ValueError(
                    f"--clip-groups: {part.strip()!r}; expected layer, or a weight for each beginning of parameters' "
                    f"names, once, such as model.embed_tokens=1,{OTHERS}=3."
                ) from None
        return found
