"""The process group of torchft whose ranks change with each quorum, on gradwire. Needs the package `torchft`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torchft.process_group import ProcessGroupWrapper

from .backend import NAME, GradwireBackend
from .work import look_through


class ProcessGroupGradwire(ProcessGroupWrapper):  # type: ignore[misc]
    """What `ProcessGroupGloo` is in torchft: give it to a `Manager`, which calls `configure` whenever the ranks change.

    Args:
        timeout: how long ranks may take to meet, and an operation to end; a `timedelta`.
    """

    def _create_pg(self, store: dist.Store, rank: int, world_size: int) -> dist.ProcessGroup:
        look_through()
        options = c10d.Backend.Options(NAME, timeout=self._timeout)
        options.global_ranks_in_group = self._global_ranks or []
        options.group_name = f"torchft-{self._quorum_id or 0}"
        group: Any = dist.ProcessGroup(store, rank, world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
        backend = GradwireBackend(store, rank, world_size, options, options.group_name)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
        return group

    def set_timeout(self, timeout: timedelta) -> None:
        super().set_timeout(timeout)
        if self._pg is not None:
            self._pg._get_backend(torch.device("cpu")).set_timeout(timeout)

    def getBackendName(self) -> str:
        return f"torchft-{NAME}"
