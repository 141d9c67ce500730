"""From the exported model to the folder of synthetic data, and to the file that compares it with private records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import dpft
from accelerate import Accelerator
from finetune.engine import WHOLE, compute_dtype, engine_name, from_first, unsharded
from finetune.output import ACCOUNT, DISTRIBUTION, MEASURES, SYNTHETIC
from finetune.recipe import Finished
from finetune.report import described, shown, versions
from finetune.synthetic import card, comparison, histogram
from finetune.synthetic.checks import check
from finetune.synthetic.conditions import in_proportion
from finetune.synthetic.downstream import Classifier, Labelled
from finetune.synthetic.generation import Generated, Sampling, gathered, generate
from finetune.synthetic.options import SynthesisOptions
from finetune.synthetic.records import ConditionedMaterials


def load(
    accelerator: Accelerator, options: SynthesisOptions, name: str | Path, kind: Any = AutoModelForCausalLM
) -> Any:
    """A whole model on this rank's device. No collective."""
    with unsharded(accelerator):
        return kind.from_pretrained(name, dtype=compute_dtype(options, accelerator)).to(accelerator.device)


def texts_of(
    accelerator: Accelerator, options: SynthesisOptions, name: str | Path, headers: Sequence[str], sampling: Sampling
) -> list[Generated]:
    """The texts of a saved model, on every rank. A collective.

    Each rank loads the model and generates its share. Where an engine shards, only rank 0 does: a model that needs
    sharding may not fit several times into the memory of one machine.
    """
    sharded = engine_name(accelerator) != WHOLE
    rank, ranks = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
    share: list[Generated] = []
    if not sharded or accelerator.is_main_process:
        model = load(accelerator, options, name)
        share = generate(model, AutoTokenizer.from_pretrained(name), headers, sampling, rank, ranks)
    return gathered(accelerator, share)


def account_of(
    options: SynthesisOptions, materials: Any, accelerator: Accelerator, output: Path, privacy: Any
) -> Path | None:
    """The file of the account that a run pays from: a new one, or that of a run that is resumed. A collective."""

    def find() -> Path | None:
        if options.resume_from_checkpoint:
            return output / ACCOUNT if (output / ACCOUNT).exists() else None
        if options.distribution != "private":
            return None
        (output / DISTRIBUTION).unlink(missing_ok=True)
        return histogram.create_account(
            output,
            privacy.resolve(len(materials.train)),
            options.histogram_epsilon,
            options.target_epsilon,
            options.user_column is not None,
            described(options.dataset),
        )

    return from_first(accelerator, find)


def _counted(finished: Finished) -> dict[str, Any]:
    """The noisy counts of the training records, and the statement of the account that paid for them. For one rank."""
    options, materials = finished.options, finished.materials
    assert isinstance(materials, ConditionedMaterials)
    categories = [materials.conditions.header(some) for some in materials.conditions.all()]
    found = histogram.counts(
        finished.output,
        options.histogram_epsilon,
        materials.headers,
        categories,
        materials.owners,
        options.records_per_user,
    )
    return {**found, "account": dpft.Account.open(finished.output / ACCOUNT).markdown() + "\n"}


def synthesise(finished: Finished) -> dict[str, Any]:
    """Generate, check, write, compare. A collective.

    Returns:
        Public figures: of synthetic texts alone.
    """
    options: SynthesisOptions = finished.options
    materials = finished.materials
    assert isinstance(materials, ConditionedMaterials)
    accelerator, conditions = finished.accelerator, materials.conditions
    counts = conditions.counts(options.generate, options.parsed_weights)
    counted: dict[str, Any] | None = None
    if options.distribution == "private":
        counted = from_first(accelerator, lambda: _counted(finished))
        counts = in_proportion(options.generate, histogram.shares(counted))
    asked = [some for some, count in zip(conditions.all(), counts, strict=True) for _ in range(count)]
    headers = [conditions.header(some) for some in asked]
    sampling = options.sampling(materials.room)
    accelerator.print(f"generating {len(headers)} texts ...")
    generated = texts_of(accelerator, options, finished.output, headers, sampling)
    kept, rejected = check([found.text for found in generated], options.rules())
    accelerator.print(f"kept {len(kept)} of {len(generated)} synthetic texts; rejected: {rejected or 'none'}")
    figures: dict[str, Any] = {"synthetic texts generated": len(generated), "synthetic texts kept": len(kept)}
    if not kept:
        accelerator.print("no synthetic text passed the checks; none is written. Loosen them, or train for longer.")
        return figures
    texts = [generated[i].text.strip() for i in kept]
    of_header = Counter(headers[i] for i in kept)
    made = card.Made(
        model=shown(options.model),
        data=described(options.dataset),
        statement=finished.statement,
        private=finished.epsilon is not None,
        conditions=conditions,
        values_from_data=materials.values_from_data,
        distribution=f"public weights ({options.weights})" if options.weights else "a uniform distribution",
        counted=None if counted is None else counted["statement"],
        account="" if counted is None else counted["account"],
        sampling=sampling,
        rules=options.rules(),
        generated=len(generated),
        kept=[of_header[conditions.header(some)] for some in conditions.all()],
        cut=sum(not generated[i].ended for i in kept),
        rejected=rejected,
        versions=versions(),
        mechanism=options.mechanism,
    )
    folder = finished.output / SYNTHETIC
    from_first(accelerator, lambda: card.write(folder, [asked[i] for i in kept], texts, materials.text_column, made))
    accelerator.print(f"synthetic data and its card, which can be published: {folder}")
    if options.measures:
        column = conditions.columns[0]
        untuned = None
        if options.compare_untuned:
            before = texts_of(accelerator, options, options.model, headers, sampling)
            untuned = Labelled([found.text for found in before], [some[column] for some in asked])
        synthetic = Labelled(texts, [asked[i][column] for i in kept])
        from_first(accelerator, lambda: _compare(finished, synthetic, untuned))
        figures["their comparison with private records, not for publication"] = MEASURES
    return figures


def _compare(finished: Finished, synthetic: Labelled, untuned: Labelled | None) -> None:
    """The private figures, printed and written. For one rank."""
    options, materials, accelerator = finished.options, finished.materials, finished.accelerator
    assert isinstance(materials, ConditionedMaterials)
    samples = comparison.Samples(
        materials.real,
        materials.held_out,
        synthetic,
        untuned,
        materials.conditions.values[materials.conditions.columns[0]],
    )
    name = options.embedding_model or finished.output
    classifier = None
    if options.classifier != "none":
        device = str(accelerator.device)
        classifier = Classifier(options.classifier, options.classifier_steps, seq_len=options.seq_len, device=device)
    found = comparison.compare(
        samples,
        load(accelerator, options, name, AutoModel),
        AutoTokenizer.from_pretrained(name),
        options.seq_len,
        classifier,
        options.seed,
    )
    comparison.write(finished.output, found)
    for line in comparison.lines(found):
        accelerator.print(line)
