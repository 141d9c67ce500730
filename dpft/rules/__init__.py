"""Per-layer gradient rules: what the backward of each supported layer reports to the clipping pass."""
