"""Whether a tensor is shared: strategies write in place only into tensors that nothing else references."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_OWNED = [object()]  # which nothing but a list has


def is_sole_owner(tensors: list[Tensor | None], k: int) -> bool:
    """Whether nothing but place ``k`` of the list has the tensor that stands there, or its memory.

    Autograd may give two parameters one tensor, or two of one memory, or one that a Function has kept. One tensor is
    one object, whose owner in C++ is Python: there it counts one, and only Python's references tell.
    """
    tensor: Any = tensors[k]  # torch does not type what it counts
    if tensor is None or not tensor.is_contiguous():
        return False
    storage = tensor.untyped_storage()  # itself the second that holds it
    alone = tensor._use_count() == 1 and torch._C._storage_Use_Count(storage._cdata) == 2
    del tensor
    return bool(alone) and sys.getrefcount(tensors[k]) == sys.getrefcount(_OWNED[0])
