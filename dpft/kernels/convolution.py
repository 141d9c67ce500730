"""Per-example gradients of convolution filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowConvolution(torch.autograd.Function):
    """A convolution by filters that are the same for all rows of the batch, with their gradient for each row.

    ``x [N, C, *space]``, N a multiple of B; ``each [B, d, C / groups, *window]``, views of one tensor, whose gradient
    is per row. The values are those of torch's convolution. ``settings``: stride, padding, dilation (a number for each
    dimension of the window) and groups.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, each: Tensor, settings: Any) -> Tensor:
        ctx.save_for_backward(x, each)
        ctx.settings = settings
        stride, padding, dilation, groups = settings
        convolution = (F.conv1d, F.conv2d)[each.dim() - 4]
        return convolution(x, each[0], None, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, each = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        x = x.to(g.dtype)  # autocast computed in the output's dtype
        dx = None
        if ctx.needs_input_grad[0]:
            none = [0] * len(stride)
            dx = torch.ops.aten.convolution_backward(
                g, x, each[0].to(g.dtype), None, stride, padding, dilation, False, none, groups, [True, False, False]
            )[0]
        grads = filter_grads(x, g, each.shape, stride, padding, dilation, groups) if ctx.needs_input_grad[1] else None
        return dx, None if grads is None else grads.to(each.dtype), None


def filter_grads(
    x: Tensor,
    g: Tensor,
    shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Per-example gradients ``[B, d, C / groups, *window]``, at least float32.

    Args:
        x: ``[N, C, *space]``, one or two dimensions of space; row i of the batch is N / B consecutive ones.
        g: ``[N, d, *space of the output]``.
        shape: of the result.
        stride: of the convolution, as ``padding`` and ``dilation``: a number for each dimension of space.
        padding: see ``stride``.
        dilation: see ``stride``.
        groups: of the channels.
    """
    rows, d, channels, *window = shape
    wide = torch.promote_types(g.dtype, torch.float32)
    if len(window) == 1 and channels == 1 and d == groups:
        # One filter for each channel: nothing larger than x is made.
        padded, length = F.pad(x, (padding[0], padding[0])), stride[0] * (g.shape[2] - 1) + 1
        taps = []
        for k in range(window[0]):
            seen = padded[:, :, k * dilation[0] : k * dilation[0] + length : stride[0]]
            taps.append((g * seen).sum(2, dtype=wide))
        return torch.stack(taps, 2).view(rows, -1, d, 1, window[0]).sum(1)
    flat = [1] * (2 - len(window))  # one dimension as an image of one row
    image = x.view(*x.shape[:2], *flat, *x.shape[2:])
    border = (*[0] * len(flat), *padding)
    columns = F.unfold(image, (*flat, *window), (*flat, *dilation), border, (*flat, *stride))  # [N, C * window, L]
    pairs = columns.view(rows, -1, groups, columns.shape[1] // groups, columns.shape[2])
    outs = g.reshape(rows, -1, groups, d // groups, columns.shape[2])
    grads = torch.einsum("bngdl,bngcl->bgdc", outs, pairs)
    return grads.to(wide).reshape(shape)
