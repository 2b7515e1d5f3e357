"""torchft's own tests of a process group, from its wheel, on gradwire; its tests of Gloo leave three of the collectives out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from parameterized import parameterized
from torch import nn
from torchft import process_group_test as theirs

from gradwire.torch.torchft import ProcessGroupGradwire


class TestProcessGroup(theirs.MultiPgBaseTest):  # type: ignore[misc]
    """Every collective over three ranks; and, after `configure` has made new groups, with a rank that leaves."""

    WORLD_SIZE = 3

    @classmethod
    def _create_pg(cls, backend: str) -> Any:
        return ProcessGroupGradwire(timeout=timedelta(seconds=10))

    @parameterized.expand(theirs._ALL_COLLECTIVES)  # type: ignore[untyped-decorator]
    def test_collective(self, collective: str) -> None:
        self._run_parallel(collective)

    @parameterized.expand(theirs._ALL_COLLECTIVES)  # type: ignore[untyped-decorator]
    def test_collective_with_resiliency(self, collective: str) -> None:
        self._run_with_resiliency(collective)


def test_every_call_of_its_interface_and_ddp() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = ProcessGroupGradwire()
    group.configure(f"localhost:{store.port}/prefix", "0", 0, 1)
    works = theirs._test_pg(group, torch.tensor([2]))
    assert len(works) == 10, "of eleven calls, two of one name"
    net = nn.parallel.DistributedDataParallel(nn.Linear(3, 4), process_group=group)
    net(torch.rand(2, 3)).sum().backward()
    group.shutdown()
