"""Layer rules: how a layer's per-example gradient is found from its input and its output gradient."""
