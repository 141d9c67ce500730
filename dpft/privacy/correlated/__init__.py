"""Correlated noise without tensors: the strategy, its sensitivity, the best one, and the secrets a resume needs."""
