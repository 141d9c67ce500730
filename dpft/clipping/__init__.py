"""Per-example clipping: from per-example losses and their graph to the clipped sum of the gradients."""
