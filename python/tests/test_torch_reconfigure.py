"""Ranks that die and join: reconfigure, and a new group after an abort, without a restart of those that live."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import gradwire
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(seconds=60)


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    """What torchrun's agent has: a store that outlives the ranks."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join(port: int, member: int, size: int) -> tuple[dist.Store, str]:
    """Makes the group without its ranks, and tells the others this member's handle."""
    told = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group(
        "gradwire", store=dist.PrefixStore("group", told), rank=0, world_size=size, timeout=_TIMEOUT, enable_reconfigure=True
    )
    with pytest.raises(RuntimeError, match="call reconfigure"):
        dist.all_reduce(torch.ones(1))
    handle = dist._get_reconfigure_handle()
    told.set(f"handle/{member}", handle)
    return told, handle


def meet(told: dist.Store, number: int, members: list[int]) -> None:
    handles = [told.get(f"handle/{member}").decode() for member in members]
    dist._reconfigure(number, handles, timeout=_TIMEOUT).wait()


def step(net: nn.Module) -> float:
    """One step of training, in which every rank has the gradient `rank + 1`; the gradient that comes of it."""
    net.zero_grad()
    (net(torch.ones(1, 1)) * (dist.get_rank() + 1)).sum().backward()
    (parameter,) = net.parameters()
    assert parameter.grad is not None
    return parameter.grad.item()


def network() -> nn.Module:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    net = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    net.register_comm_hook(None, allreduce_hook)
    return net


def lives(rank: int, size: int, url: str, port: int, gate: str) -> Any:
    """Members 0 to 2 form a group; member 1 is killed; 0 and 2 go on alone; member 3 comes in its place."""
    told, _ = join(port, rank, size)
    meet(told, 1, [0, 1, 2])
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 3)
    net = network()
    assert step(net) == 2.0
    open(f"{gate}.{rank}", "w").close()
    with pytest.raises(RuntimeError, match="rank 1 ") as caught:
        while True:
            step(net)
    killed = str(caught.value)
    with pytest.raises(ValueError, match="used before"):
        meet(told, 1, [0, 2])
    with pytest.warns(RuntimeWarning, match="2 ranks now"):
        meet(told, 2, [0, 2])
    assert (dist.get_rank(), dist.get_world_size()) == (rank // 2, 2)
    assert step(net) == 1.5
    meet(told, 3, [0, 3, 2])
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 3)
    # Who has trained on tells the one that joins what it has missed.
    for parameter in net.parameters():
        dist.broadcast(parameter.data, 0)
    assert step(net) == 2.0
    return killed, [parameter.item() for parameter in net.parameters()]


def joins(rank: int, size: int, url: str, port: int) -> Any:
    told, _ = join(port, 3, 3)
    meet(told, 3, [0, 3, 2])
    assert (dist.get_rank(), dist.get_world_size()) == (1, 3)
    # Not by DDP, which would begin with collectives of its own that the others have behind them.
    net = nn.Linear(1, 1, bias=False)
    dist.broadcast(net.weight.data, 0)
    (net(torch.ones(1, 1)) * 2).sum().backward()
    assert net.weight.grad is not None
    dist.all_reduce(net.weight.grad.div_(3))
    assert net.weight.grad.item() == 2.0
    return net.weight.item()


def wait_for(paths: list[str]) -> None:
    deadline = time.monotonic() + 90
    while not all(map(os.path.exists, paths)):
        assert time.monotonic() < deadline, "the ranks did not meet"
        time.sleep(0.01)


def test_survivors_go_on_without_a_killed_rank_and_a_new_one_joins(store: dist.TCPStore, tmp_path: Any) -> None:
    gate = str(tmp_path / "at-work")
    ranks = Ranks(3, lives, store.port, gate)
    wait_for([f"{gate}.{rank}" for rank in range(3)])
    newcomer = Ranks(1, joins, store.port)
    ranks.kill(1)
    (first, _, last), (joined,) = ranks.results(but=1), newcomer.results()
    for killed, parameters in (first, last):
        assert f"pid {ranks.processes[1].pid}" in killed
        assert parameters == [joined]


def starts_anew(rank: int, size: int, url: str, gate: str) -> Any:
    dist.init_process_group("gradwire", init_method=f"{url}/first", rank=rank, world_size=size, timeout=_TIMEOUT)
    dist.all_reduce(torch.ones(1))
    open(f"{gate}.{rank}", "w").close()
    with pytest.raises(gradwire.RankFailedError) as caught:
        while True:
            dist.all_reduce(torch.ones(1000))
    assert caught.value.ranks == [1]
    dist.distributed_c10d._abort_process_group()
    assert not dist.is_initialized()
    dist.init_process_group("gradwire", init_method=f"{url}/second", rank=rank // 2, world_size=2, timeout=_TIMEOUT)
    dist.all_reduce(one := torch.ones(1))
    dist.destroy_process_group()
    return one.item()


def test_after_an_abort_survivors_form_a_new_group_in_the_same_processes(tmp_path: Any) -> None:
    gate = str(tmp_path / "at-work")
    ranks = Ranks(3, starts_anew, gate)
    wait_for([f"{gate}.{rank}" for rank in range(3)])
    ranks.kill(1)
    assert ranks.results(but=1) == [2.0, None, 2.0]
