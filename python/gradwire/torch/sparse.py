"""All-reduce of sparse tensors: everybody gathers everybody's indices and values, and adds them in rank order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from .. import _native
from .work import Work


def all_reduce(group: _native.Group, tensors: list[Tensor], opts: Any) -> Work:
    """Sums sparse COO tensors over all ranks, in place. Done when it returns, also where asynchrony was asked for: its
    second step depends on the first, and nothing may come between them on any rank.

    Raises:
        ValueError: another reduction than the sum.
    """
    if getattr(opts.reduceOp, "op", opts.reduceOp) != c10d.ReduceOp.SUM:
        raise ValueError("all_reduce of a sparse tensor can only sum: make it dense first. Nothing was sent")
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(_sum(group, tensor.coalesce()))
    return Work(None, tensors)


def _sum(group: _native.Group, own: Tensor) -> Tensor:
    size = group.world_size
    counts = torch.empty(size, dtype=torch.int64)
    group.run("all_gather", [torch.tensor([own._nnz()])], [counts])
    indices = [torch.empty((int(count), own.sparse_dim()), dtype=torch.int64) for count in counts]
    values = [own.values().new_empty((int(count), *own.values().shape[1:])) for count in counts]
    group.run("all_gather", [own.indices().t().contiguous()], list(indices))
    group.run("all_gather", [own.values().contiguous()], list(values))
    # Coalescing adds what has the same index in the order in which it stands, which is the same on every rank.
    return torch.sparse_coo_tensor(torch.cat(indices).t(), torch.cat(values), own.shape).coalesce()
