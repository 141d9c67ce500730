"""Which examples are in a logical batch: one class for each sampler that the accountant knows."""
