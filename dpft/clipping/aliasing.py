"""Whether a tensor is shared: strategies write in place only into tensors that nothing else references."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_OWNED = [object()]  # an object referenced only by a list


def is_sole_owner(tensors: list[Tensor | None], k: int) -> bool:
    """Whether entry ``k`` of the list is the only reference to its tensor and to the tensor's memory.

    Autograd may return one tensor for two parameters, or two that share memory, or one that a Function has kept. In
    C++ the Python object counts as one reference, whatever refers to it, so Python's references are counted too.
    """
    tensor: Any = tensors[k]  # the reference counts have no type stubs
    if tensor is None or not tensor.is_contiguous():
        return False
    storage = tensor.untyped_storage()  # itself a second reference
    alone = tensor._use_count() == 1 and torch._C._storage_Use_Count(storage._cdata) == 2
    del tensor
    return bool(alone) and sys.getrefcount(tensors[k]) == sys.getrefcount(_OWNED[0])
