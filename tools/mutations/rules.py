"""Mutations of the rules: of experts, and of parameters that modules use as plain tensors."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

EXPERTS = ("tests/rules/test_experts.py", "tests/kernels/test_experts.py")
TRACKED = ("tests/rules/test_tracked.py",)
ALONE = ("tests/clipping/test_one_by_one.py", "tests/models/test_isolation.py")
_EXPERTS = "dpft/kernels/experts.py"
_FUNCTIONS = "dpft/rules/tracked_functions.py"

RULE_MUTATIONS = (
    Mutation(
        "segments_split_late",
        "the first pair of an example counts as the one's before",
        _EXPERTS,
        "example, firsts)",
        "example, firsts, right=True)",
        EXPERTS,
    ),
    Mutation(
        "segments_not_masked",
        "the pairs behind a segment count in its norm",
        _EXPERTS,
        "yield which, x[index].masked_fill_(behind, 0), g[index].masked_fill_(behind, 0)",
        "yield which, x[index], g[index]",
        EXPERTS,
    ),
    Mutation(
        "experts_norms_not_summed",
        "an example's norm is that of one expert",
        _EXPERTS,
        "return sq.view(routing.experts, routing.examples).sum(0)",
        "return sq.view(routing.experts, routing.examples).amax(0)",
        EXPERTS,
    ),
    Mutation(
        "experts_factors_of_others",
        "a pair is weighted by another example's factor",
        _EXPERTS,
        "scales = factors[routing.example_of].unsqueeze(1)",
        "scales = factors[routing.example_of.flip(0)].unsqueeze(1)",
        EXPERTS,
    ),
    Mutation(
        "pairs_not_in_order",
        "the pairs of an expert are not sorted by example",
        _EXPERTS,
        "chosen, order = torch.sort(flat, stable=True)",
        "chosen, order = torch.sort(flat, stable=True)\n"
        "    order = order[(chosen * len(order) - torch.arange(len(order))).argsort()]",
        EXPERTS,
    ),
    Mutation(
        "no_expert_has_a_bias",
        "slots that a mask has taken out get the last expert's bias",
        _EXPERTS,
        "        t[self.on_host[-1] :] = 0",
        "        pass",
        EXPERTS,
    ),
    Mutation(
        "selected_tokens_accepted",
        "a selection of tokens that the batch divides is taken for all of them",
        "dpft/rules/experts.py",
        "if not is_whole_batch(host, tokens):",
        "if tokens % rows:",
        EXPERTS,
    ),
    # parameters that are used as plain tensors
    Mutation(
        "order_of_tokens_unseen",
        "a first dimension that the batch divides is taken for its tokens, and nobody looks at their order",
        "dpft/clipping/strategies.py",
        "        if anywhere:",
        "        if False:",
        TRACKED,
    ),
    Mutation(
        "taps_in_reverse",
        "the gradients of a filter's taps are exchanged",
        "dpft/kernels/convolution.py",
        "return torch.stack(taps, 2)",
        "return torch.stack(taps[::-1], 2)",
        TRACKED,
    ),
    Mutation(
        "parents_reads_unseen",
        "nobody looks whether the code around a module reads its parameters",
        "dpft/rules/cover.py",
        "        if read and isinstance(own_rule, TrackedRule):",
        "        if False:",
        TRACKED,
    ),
    Mutation(
        "padding_beside_a_row",
        "a row that runs alone may depend on how far it is padded",
        "dpft/models/forward.py",
        "        if check is not None and loss.numel() == 1:",
        "        if False:",
        ALONE,
    ),
    Mutation(
        "backward_inside_a_backward",
        "what it accumulates is not clipped",
        "dpft/clipping/one_by_one.py",
        "        if state.alone and may_accumulate(loss):",
        "        if False:",
        ("tests/clipping/test_escapes.py",),
    ),
)
