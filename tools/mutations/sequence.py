"""Mutations of tokens spread over ranks: each bounds, draws or sums something else than the whole example."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

# One launch of two ranks, of about a minute. `-m slow` is not needed for a test that is named.
SPREAD = ("tests/engines/test_sequence.py::test_sequence[zero2-2]",)
SHARDED = ("tests/engines/test_sequence.py::test_sequence[fsdp2-2]",)

SEQUENCE_MUTATIONS = (
    Mutation(
        "spread_norm_of_own_share",
        "the norm is that of the rank's share of the gradient alone",
        "dpft/clipping/spread.py",
        "        self.sq = self._spread.total(self.sq)",
        "        self.sq = self.sq.clone()",
        SPREAD,
    ),
    Mutation(
        "spread_loss_not_weighted",
        "each rank's loss is the mean over its own tokens",
        "dpft/models/forward.py",
        "            losses = losses * share\n",
        "            losses = losses * torch.ones_like(share)\n",
        SPREAD,
    ),
    Mutation(
        "spread_ranks_draw_apart",
        "the ranks of one sequence draw different examples",
        "dpft/prepare.py",
        "rank=ranks.rank if sequence is None else sequence.data_rank,\n"
        "                    world_size=ranks.world if sequence is None else sequence.data_world,",
        "rank=ranks.rank,\n                    world_size=ranks.world,",
        SPREAD,
    ),
    Mutation(
        "spread_label_of_the_next_rank",
        "the last token of a rank's part predicts nothing",
        "dpft/engines/sequence.py",
        "            targets = targets[:, mine].contiguous()",
        "            targets = targets[:, mine].contiguous().index_fill(1, torch.tensor([part - 1]), IGNORE_INDEX)",
        SHARDED,
    ),
    Mutation(
        "spread_order_of_the_owners",
        "shares go to the owners in the order of the ranks, and not by their place in the sequence",
        "dpft/engines/sequence.py",
        "sent = whole.view(-1, size, part).transpose(0, 1).reshape(-1)",
        "sent = whole.view(-1, size, part).flip(1).transpose(0, 1).reshape(-1)",
        SHARDED,
    ),
)
