"""Groups whose ranks change: c10d's `reconfigure`, by which survivors go on without a dead rank, and a new one joins.

Ranks meet anew in the store that the group was made with, under the number of the reconfiguration, so the store must outlive
them: torchrun's does.
"""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def new_handle() -> str:
    """What names this process's part of one group to its peers; no other has the same."""
    return f"gradwire:{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"


def place_among(handles: Iterable[str], own: str) -> tuple[int, int]:
    """Rank and world size: by the position in a list; in a set, by the order of the alphabet, which is the same for all.

    Raises:
        ValueError: `own` is not there, or one is there twice, or one is none of ours. Nothing was sent.
    """
    ordered = list(handles) if isinstance(handles, (list, tuple)) else sorted(handles)
    if len(set(ordered)) != len(ordered):
        raise ValueError(f"reconfigure: a handle is there twice in {ordered}: give one of each rank")
    foreign = [handle for handle in ordered if not handle.startswith("gradwire:")]
    if foreign:
        raise ValueError(f"reconfigure: {foreign[0]!r} is not a handle of this backend: see get_reconfigure_handle()")
    if own not in ordered:
        raise ValueError(f"reconfigure: this process's own handle {own} is not among {ordered}: it would have no rank")
    return ordered.index(own), len(ordered)


def warn_of_new_size(before: int, now: int) -> None:
    """Says what PyTorch goes on to compute with the old size: it keeps one in C++, which Python cannot reach."""
    if before != now:
        warnings.warn(
            f"the group has {now} ranks now, and PyTorch's C++ still counts {before}: DistributedDataParallel would divide "
            "its gradients by that. Register a hook that asks anew "
            "(net.register_comm_hook(None, torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook)), or "
            "keep the size by letting a new rank join",
            RuntimeWarning,
            stacklevel=3,
        )


def look_up_place(kind: type[Any]) -> None:
    """Makes `ProcessGroup.rank` and `size` ask a backend of class `kind`, whose place changes with a reconfiguration."""
    outer: Any = dist.ProcessGroup
    if getattr(outer.rank, "_gradwire", False):
        return

    def asking(name: str) -> Any:
        original = getattr(outer, name)

        def ask(group: Any) -> int:
            backend = _only_backend(group)
            return int(getattr(backend, name)() if isinstance(backend, kind) else original(group))

        ask._gradwire = True  # type: ignore[attr-defined]
        return ask

    outer.rank, outer.size = asking("rank"), asking("size")


def _only_backend(group: Any) -> Any:
    try:
        return group._get_backend(torch.device("cpu"))
    except RuntimeError:  # a group without one for the CPU
        return None
