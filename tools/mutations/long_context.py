"""Mutations of long contexts: tiles of a block, and what waits in other memory."""

from __future__ import annotations

from tools.mutations.mutation import Mutation

TILES = ("tests/long_context/test_tiles.py",)

LONG_CONTEXT_MUTATIONS = (
    Mutation(
        "norm_of_each_tile",
        "the gradients of a block's later tiles are squared one by one, too",
        "dpft/rules/tiles.py",
        "            found.grad = use.add_grad(x, g, found.grad)",
        "            found.grad = use.add_grad(x, g, found.grad)\n"
        "            if hasattr(self.running, 'sq'):\n"
        "                self.running.sq += use.upper_sq_norm(x, g, None)",
        TILES,
    ),
    Mutation(
        "last_tile_dropped",
        "the last tile of a block has no part in its gradient, and nobody counts its tokens",
        "dpft/long_context/tiles.py",
        "                    tile_pass.begin(span.stop - span.start)",
        "                    tile_pass.begin(span.stop - span.start)\n                    if span is self.spans[-1]:\n"
        "                        continue",
        TILES,
    ),
    Mutation(
        "only_one_tile_kept",
        "a parameter's gradient is that of its last tile",
        "dpft/rules/tiles.py",
        "            found.grad.add_(grad)",
        "            found.grad.copy_(grad)",
        TILES,
    ),
    Mutation(
        "hidden_in_a_tile",
        "nobody walks the graph of a tile for a use that no rule sees",
        "dpft/long_context/tiles.py",
        "            check_coverage(y, names)\n",
        "            assert names is None or names\n",
        TILES,
    ),
    Mutation(
        "window_one_too_long",
        "a query sees one key before its window",
        "dpft/long_context/attention.py",
        "(distance >= 0) & (distance < window)",
        "(distance >= 0) & (distance <= window)",
        ("tests/long_context/test_attention.py",),
    ),
)
