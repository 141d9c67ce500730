"""Mutations of clipping and kernels: each leaves another gradient than the clipped sum, without an error."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

GRADIENTS = ("tests/clipping/test_gradients.py",)
SENSITIVITY = ("tests/clipping/test_sensitivity.py::test_adversarial_example", *GRADIENTS)
ROBUST = ("tests/clipping/test_robustness.py", *GRADIENTS)
KERNELS = ("tests/kernels",)
PREPARE = ("tests/test_prepare.py", "tests/test_prepare_refusals.py", "tests/test_prepare_spending.py")
ESCAPES = ("tests/clipping/test_escapes.py",)
LOSSES, HEADS = ("tests/models/test_losses.py",), ("tests/models/test_heads.py",)

_LINEAR, _EMBEDDING = "dpft/kernels/linear.py", "dpft/kernels/embedding.py"
_GRAM, _PROBE = "dpft/kernels/gram.py", "dpft/clipping/probe.py"
_WEIGHTED, _FACTORS = "dpft/kernels/weighted.py", "dpft/clipping/factors.py"
_LOSSES, _TARGETS = "dpft/models/losses.py", "dpft/models/targets.py"
_PASSES, _BOUNDARY, _GUARD = "dpft/clipping/passes.py", "dpft/clipping/boundary.py", "dpft/clipping/guard.py"

GRADIENT_MUTATIONS = (
    # clipping
    Mutation("factor_not_capped", "small gradients are scaled up to C", _FACTORS, ".clamp(max=1.0)", "", SENSITIVITY),
    Mutation(
        "factor_squared",
        "the factor is C / norm^2",
        _FACTORS,
        "norms = sq_norms.sqrt()",
        "norms = sq_norms",
        SENSITIVITY,
    ),
    Mutation(
        "gamma_dropped",
        "automatic clipping divides by the bare norm",
        _FACTORS,
        "(norms + self.gamma)",
        "norms",
        (*SENSITIVITY, *ROBUST),
    ),
    Mutation(
        "weights_ignored",
        "padding rows get a factor",
        _FACTORS,
        "factors = factors * row_weights(weights)",
        "pass",
        ("tests/clipping/test_situations.py::test_example_weight",),
    ),
    Mutation(
        "huge_norms_clipped",
        "gradients that overflow are scaled, not dropped",
        _FACTORS,
        "norms <= LARGEST_NORM",
        "norms == norms",
        ESCAPES,
    ),
    Mutation(
        "vectors_not_in_norm",
        "biases and norm weights are left out of the norm",
        _PASSES,
        "        for grad in self._vectors.values():\n            self.sq += sq_norm(grad)\n        return set()",
        "        return set()",
        GRADIENTS,
    ),
    Mutation(
        "norm_pass_forgets_vectors",
        "two-pass leaves them out",
        _PASSES,
        "        for grad in (*self._vectors.values(), *self._summed.values()):\n            self.sq += sq_norm(grad)",
        "        for grad in self._summed.values():\n            self.sq += sq_norm(grad)",
        GRADIENTS,
    ),
    Mutation(
        "cross_term_dropped",
        "one-pass forgets the cross term of a tied weight",
        _PASSES,
        "kept.sq = kept.sq + use.upper_sq_norm(x, g, None) + cross",
        "kept.sq = kept.sq + use.upper_sq_norm(x, g, None)",
        GRADIENTS,
    ),
    Mutation(
        "cross_term_once",
        "two-pass counts the cross term once",
        _PASSES,
        "self.sq += 2 * (rows.double() * g).sum((1, 2))",
        "self.sq += (rows.double() * g).sum((1, 2))",
        GRADIENTS,
    ),
    Mutation(
        "kept_norm_dropped",
        "one-pass leaves matrices out of the norm",
        _PASSES,
        "            kept.check()\n            self.sq += kept.sq",
        "            kept.check()",
        GRADIENTS,
    ),
    Mutation(
        "second_use_overwrites",
        "a matrix used twice keeps the last gradient's norm",
        _PASSES,
        "            kept.grad = use.add_grad(x, g, kept.grad)\n            kept.sq = sq_norm(kept.grad)",
        "            kept.grad = use.add_grad(x, g, kept.grad)",
        GRADIENTS,
    ),
    Mutation(
        "backward_twice",
        "a loss can be differentiated twice",
        _BOUNDARY,
        "job = ctx.box.pop()",
        "job = ctx.box[0]",
        ("tests/clipping",),
    ),
    Mutation(
        "mean_of_padding",
        "the reported loss counts padding rows",
        _BOUNDARY,
        "present.sum().clamp(min=1)",
        "len(present)",
        ("tests/clipping", "tests/models"),
    ),
    Mutation(
        "added_terms_accepted",
        "a term added to the clipped gradient passes",
        _GUARD,
        "if len(given) == 1 and given[0] != (grad.data_ptr(), grad._version):",
        "if False:",
        ("tests/clipping", "tests/test_wrap.py"),
    ),
    Mutation(
        "fp16_sums",
        "sums of fp16 parameters are rounded to fp16",
        _GUARD,
        "p.dtype == torch.float16",
        "False",
        ESCAPES,
    ),
    # kernels
    Mutation(
        "gram_pairs_once", "pairs of tiles are counted once", _GRAM, "alpha=1 if i == j else 2", "alpha=1", KERNELS
    ),
    Mutation(
        "gram_single_pairs_once",
        "float32 blocks beside the diagonal are counted once",
        _GRAM,
        "b[:, :, edge:].sum((1, 2)), alpha=2)",
        "b[:, :, edge:].sum((1, 2)))",
        KERNELS,
    ),
    Mutation(
        "gram_without_bound",
        "a float32 Gram norm is released without its rounding error",
        _GRAM,
        "return GramSums(sq.clamp_(min=0.0), error, sizes)",
        "return GramSums(sq.clamp_(min=0.0), 0 * error, sizes)",
        KERNELS,
    ),
    Mutation(
        "gram_never_again",
        "what float32 cannot tell is not computed again",
        _GRAM,
        "(~(part <= _TOLERATED)).nonzero()",
        "(part < 0).nonzero()",
        KERNELS,
    ),
    Mutation(
        "stale_input",
        "products of an input that was changed since are taken for its own",
        _GRAM,
        "x.dtype, x._version)",
        "x.dtype)",
        KERNELS,
    ),
    Mutation(
        "scaled_input_of_the_norm",
        "rounding of the scaled operand is left out of the norm",
        _LINEAR,
        "(sq.sqrt() + eps * sizes).square() + (16 * eps * sizes).square()",
        "sq",
        (*KERNELS, *SENSITIVITY),
    ),
    Mutation(
        "probe_with_equal_seeds",
        "the isolation check seeds all losses alike",
        _PROBE,
        "    return torch.from_numpy(seeds).to(losses.device, losses.dtype)",
        "    return torch.ones_like(losses)",
        ("tests/clipping/test_refusals.py",),
    ),
    Mutation(
        "probe_not_compared",
        "what the isolation check saw is not compared",
        _PROBE,
        "        mixed[key] = (apart & ",
        "        mixed[key] = (apart & (seeds < 0) & ",
        ("tests/clipping/test_refusals.py",),
    ),
    Mutation(
        "gram_diagonal_twice",
        "tiles on the diagonal are counted twice",
        _GRAM,
        "alpha=1 if i == j else 2",
        "alpha=2",
        KERNELS,
    ),
    Mutation(
        "feature_misses_tile",
        "feature tiles miss the last columns",
        _LINEAR,
        "for j in range(0, p, step_p):",
        "for j in range(0, p - step_p + 1, step_p):",
        KERNELS,
    ),
    Mutation(
        "tail_of_norm",
        "the elements after the last run are left out",
        _LINEAR,
        " + rest.double().square_()",
        "",
        KERNELS,
    ),
    Mutation(
        "wide_product_16_bits",
        "two-pass makes the product in 16 bits",
        _WEIGHTED,
        "        return a.to(wide).mT @ b.to(wide)",
        "        return (a.bfloat16().mT @ b.bfloat16()).to(wide)",
        (*KERNELS, *GRADIENTS),
    ),
    Mutation(
        "weighted_zero_not_masked",
        "0 * inf of a dropped example is NaN",
        _WEIGHTED,
        "    return scaled if dropped is None else scaled.masked_fill_(dropped, 0)",
        "    return scaled",
        (*KERNELS, *ROBUST),
    ),
    Mutation(
        "embedding_repeats",
        "a token's repeats are squared one by one",
        _EMBEDDING,
        "index_add_(0, rows, block.flatten(0, 1))",
        "copy_(block.flatten(0, 1))",
        KERNELS,
    ),
    Mutation(
        "embedding_padding",
        "the padding token has a gradient in the norm",
        _EMBEDDING,
        "            block = block.masked_fill(skip, 0)",
        "            pass",
        KERNELS,
    ),
    Mutation(
        "head_rows_transposed",
        "the cross term reads the wrong positions",
        _EMBEDDING,
        "at = ids[some, None, t : t + step]",
        "at = ids[some, None, t : t + step].flip(2)",
        (*KERNELS, *GRADIENTS),
    ),
    Mutation(
        "vector_zero_not_masked",
        "0 * inf in a vector is NaN",
        _WEIGHTED,
        "None if finite else (factors == 0).unsqueeze(1))",
        "None)",
        (*KERNELS, *ROBUST),
    ),
    # the losses of heads
    Mutation(
        "divided_by_batch_tokens",
        "a loss is divided by the number of targets in the batch",
        _LOSSES,
        "    total = sizes.reshape(batch, -1).sum(1)\n",
        "    total = sizes.sum() / batch\n",
        (*LOSSES, *HEADS),
    ),
    Mutation(
        "items_in_batch_used",
        "the number of targets in the batch reaches the loss",
        "dpft/models/forward.py",
        '            kwargs.pop("num_items_in_batch", None)\n',
        "",
        HEADS,
    ),
    Mutation(
        "any_target_taken",
        "a loss of selected tokens is cut into equal parts",
        _LOSSES,
        "        elif not of_examples:\n",
        "        elif False:\n",
        LOSSES,
    ),
    Mutation(
        "permutation_followed",
        "labels in another order are taken for the batch's",
        _TARGETS,
        "(index != torch.arange(self._batch, device=index.device))",
        "(index != index)",
        LOSSES,
    ),
    Mutation(
        "answers_in_padding",
        "the padding of a text is among the candidates for an answer",
        _LOSSES,
        "        if func is F.cross_entropy and self._rows.is_position(",
        "        if False and self._rows.is_position(",
        HEADS,
    ),
    Mutation(
        "terms_added_to_losses",
        "a model adds a term of the batch to each example's loss",
        _LOSSES,
        "isinstance(other, int | float)",
        "True",
        LOSSES,
    ),
)
