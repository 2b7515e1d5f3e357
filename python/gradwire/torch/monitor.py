"""monitored_barrier: a barrier by which rank 0 finds out who does not come, and which leaves the group usable."""

from __future__ import annotations

import time

import torch

from .. import _native

# Tags of users are below 2**31; those from here on are the barriers'.
_TAGS = 1 << 31


def barrier(group: _native.Group, number: int, timeout_s: float, wait_all_ranks: bool) -> None:
    """Rank 0 hears from every rank, then releases all; `number` counts the group's monitored barriers.

    Raises:
        RuntimeError: on rank 0 naming the rank that failed (all of them with `wait_all_ranks`), elsewhere that rank 0 did.
    """
    tag = _TAGS + number % _TAGS
    deadline = time.monotonic() + timeout_s
    if group.rank == 0:
        _hear_all(group, tag, deadline, timeout_s, wait_all_ranks)
        for work in [group.send(torch.zeros(1), rank, tag) for rank in range(1, group.world_size)]:
            work.wait()
        return
    try:
        if group.send(torch.zeros(1), 0, tag, timeout_s).wait(_left(deadline)):
            if group.recv(torch.zeros(1), 0, tag, max(_left(deadline), 0.001)).wait():
                return
    except RuntimeError as error:
        cause: Exception | None = error
    else:
        cause = None
    raise RuntimeError(
        f"Rank {group.rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv from "
        "rank 0. Please check rank 0 logs for the failing rank."
    ) from cause


def _hear_all(group: _native.Group, tag: int, deadline: float, timeout_s: float, wait_all_ranks: bool) -> None:
    milliseconds = int(timeout_s * 1000)
    failed = []
    for rank in range(1, group.world_size):
        try:
            group.recv(torch.zeros(1), rank, tag, max(_left(deadline), 0.001)).wait()
        except RuntimeError as error:
            if milliseconds == 0 and not wait_all_ranks:
                raise RuntimeError(f"Rank 0 timed out in monitoredBarrier after {milliseconds} ms.") from error
            if not wait_all_ranks:
                raise RuntimeError(f"Rank {rank} failed to pass monitoredBarrier in {milliseconds} ms") from error
            failed.append(rank)
    if failed:
        names = ", ".join(map(str, failed))
        raise RuntimeError(f"Ranks {names} failed to pass monitoredBarrier in {milliseconds} ms")


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)
