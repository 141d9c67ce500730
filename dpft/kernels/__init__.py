"""Per-example squared gradient norms and weighted sums of gradients, as pure functions on tensors."""

from dpft.kernels.embedding import embedding_sq_norm
from dpft.kernels.impl import resolve_impl
from dpft.kernels.linear import linear_grad_sq_norm, linear_sq_norm

__all__ = ["embedding_sq_norm", "linear_grad_sq_norm", "linear_sq_norm", "resolve_impl"]
