"""split_group for ranks that are in none of the new groups.

c10d asks every rank's backend to split, and crashes where a backend made in Python answers None. So the question never gets to
the backend of a rank without a group: `ProcessGroup.split_group` answers None there, as it does for NCCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def leave_out_strangers(name: str) -> None:
    """Makes `ProcessGroup.split_group` of groups of the backend `name` answer None to a rank that is not asked for."""
    outer: Any = dist.ProcessGroup
    if getattr(outer.split_group, "_gradwire", False):
        return
    split_group = outer.split_group

    def ask(group: Any, ranks: Sequence[int], *arguments: Any, **named: Any) -> Any:
        stranger = group.rank() not in ranks
        names = {group._get_backend(device).getBackendName() for device in group._device_types} if stranger else set()
        if names == {name}:
            return None
        made = split_group(group, ranks, *arguments, **named)
        # Beside another backend, which has to take part, ours has made a group of this rank alone.
        return None if name in names else made

    ask._gradwire = True  # type: ignore[attr-defined]
    outer.split_group = ask
