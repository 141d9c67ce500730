"""A synthetic data set from a private model: conditions, generation, checks, measures, the data card."""
