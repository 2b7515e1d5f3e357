"""What PyTorch builds on the operations of c10d: each feature a function of the rank and the size of the group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

FEATURES: dict[str, Callable[[int, int], None]] = {}


def feature(body: Callable[[int, int], None]) -> Callable[[int, int], None]:
    FEATURES[body.__name__] = body
    return body


@feature
def object_collectives(rank: int, size: int) -> None:
    told: list[Any] = [None] * size
    dist.all_gather_object(told, {"rank": rank, "long": "x" * rank * 1000})
    assert [len(one["long"]) for one in told] == [r * 1000 for r in range(size)]
    gathered = [None] * size if rank == 1 else None
    dist.gather_object(("from", rank), gathered, dst=1)
    assert gathered is None or gathered == [("from", r) for r in range(size)]
    box: list[Any] = [None]
    dist.scatter_object_list(box, [f"for {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert box == [f"for {rank}"]
    box = [{1, 2}, "last"] if rank == size - 1 else [None, None]
    dist.broadcast_object_list(box, src=size - 1)
    assert box == [{1, 2}, "last"]
    if rank == 0:
        dist.send_object_list(["one", 2], dst=1)
    elif rank == 1:
        got: list[Any] = [None, None]
        assert dist.recv_object_list(got, src=0) == 0 and got == ["one", 2]


@feature
def functional_collectives(rank: int, size: int) -> None:
    import torch.distributed._functional_collectives as functional

    group = dist.group.WORLD
    own = torch.arange(4.0) + rank
    total = sum(torch.arange(4.0) + r for r in range(size))
    assert torch.equal(functional.all_reduce(own, "sum", group), total)
    assert torch.equal(functional.all_reduce(own, "avg", group), total / size)
    both = functional.all_reduce_coalesced([own, own * 2], "sum", group)
    assert torch.equal(both[0], total) and torch.equal(both[1], total * 2)
    everyone = torch.cat([torch.arange(4.0) + r for r in range(size)])
    assert torch.equal(functional.all_gather_tensor(own, 0, group), everyone)
    sideways = functional.all_gather_tensor(own.reshape(2, 2), 1, group)
    assert torch.equal(sideways, torch.cat([(torch.arange(4.0) + r).reshape(2, 2) for r in range(size)], 1))
    part = functional.reduce_scatter_tensor(everyone + rank, "sum", 0, group)
    assert torch.equal(part, everyone.reshape(size, 4)[rank] * size + sum(range(size)))
    assert torch.equal(functional.broadcast(own, size - 1, group), torch.arange(4.0) + size - 1)
    splits = [r + 1 for r in range(size)]
    swapped = functional.all_to_all_single(torch.full((sum(splits),), rank), [rank + 1] * size, splits, group)
    assert torch.equal(swapped, torch.arange(size).repeat_interleave(rank + 1))
    ring = functional.permute_tensor(own, [(r + 1) % size for r in range(size)], group)
    assert torch.equal(ring, torch.arange(4.0) + (rank - 1) % size)


@feature
def groups_within_the_group(rank: int, size: int) -> None:
    ones = [rank for rank in range(size) if rank % 2]
    odd = dist.new_group(ones)
    if rank in ones:
        dist.all_reduce(one := torch.ones(1), group=odd)
        assert one == len(ones) and dist.get_rank(odd) == ones.index(rank)
    mine, _ = dist.new_subgroups(2)
    dist.all_reduce(number := torch.tensor(rank), group=mine)
    assert number == sum(range(rank // 2 * 2, rank // 2 * 2 + 2))
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    split = dist.split_group(split_ranks=halves)
    dist.all_reduce(number := torch.tensor(rank), group=split)
    assert number == sum(next(half for half in halves if rank in half))
    few = dist.split_group(split_ranks=[[0, 1]])
    assert (few is dist.GroupMember.NON_GROUP_MEMBER) == (rank >= 2)
    if rank < 2:
        dist.all_reduce(one := torch.ones(1), group=few)
        assert one == 2
    for group in (odd, mine, split):
        if isinstance(group, dist.ProcessGroup):
            dist.destroy_process_group(group)
    dist.barrier()


@feature
def device_mesh_and_dtensor(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    whole = torch.arange(48.0).reshape(8, 6)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("rows", "columns"))
    spread = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
    assert spread.to_local().numel() == 48 // size
    assert torch.equal(spread.full_tensor(), whole)
    assert torch.equal((spread @ spread.t()).full_tensor(), whole @ whole.t())
    moved = spread.redistribute(placements=[Shard(1), Replicate()])
    assert torch.equal(moved.full_tensor(), whole)
    line = init_device_mesh("cpu", (size,))
    uneven = distribute_tensor(torch.arange(7.0), line, [Shard(0)])
    assert torch.equal(uneven.full_tensor(), torch.arange(7.0))
    summed = distribute_tensor(whole, line, [Shard(0)]).sum(0)
    assert summed.placements == (Partial(),) or summed.full_tensor().shape == (6,)
    assert torch.equal(summed.full_tensor(), whole.sum(0))
    scattered = summed.redistribute(placements=[Shard(0)])
    assert torch.equal(scattered.full_tensor(), whole.sum(0))


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 5))


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 9, generator=generator) for _ in range(count)]


def alone(optimizer: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """The parameters that one process comes to with all of each batch."""
    net = network()
    steps = optimizer(net.parameters())
    for batch in batches():
        steps.zero_grad()
        net(batch).square().mean().backward()
        steps.step()
    return {name: value.detach() for name, value in net.named_parameters()}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


@feature
def fsdp2(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for shape in [(size,), (2, size // 2)]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        net: Any = network()
        for layer in [net[0], net[2], net]:
            fully_shard(layer, mesh=mesh)
        steps = adam(net.parameters())
        for batch in batches():
            steps.zero_grad()
            net(batch[rank::size]).square().mean().backward()
            steps.step()
        for name, value in alone(adam).items():
            assert torch.allclose(net.get_parameter(name).full_tensor(), value, atol=1e-5), f"{name} over {shape}"
    halves: Any = fully_shard(network(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    halves(batches(1)[0]).float().square().mean().backward()
    assert all(one.grad is not None and one.grad.full_tensor().isfinite().all() for one in halves.parameters())


@feature
def zero_redundancy_optimizer(rank: int, size: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    net = DistributedDataParallel(network())
    steps = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=0.01)
    for batch in batches():
        steps.zero_grad()
        net(batch[rank::size]).square().mean().backward()
        steps.step()
    steps.consolidate_state_dict(to=0)
    assert rank > 0 or len(steps.state_dict()["state"]) == 4
    for name, value in alone(adam).items():
        assert torch.allclose(net.module.get_parameter(name), value, atol=1e-5), name


@feature
def compiled_collectives(rank: int, size: int) -> None:
    import torch.distributed._functional_collectives as functional

    def step(tensor: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(tensor * 2, "sum", dist.group.WORLD)
        every = functional.all_gather_tensor(total[:2], 0, dist.group.WORLD)
        part = functional.reduce_scatter_tensor(every, "sum", 0, dist.group.WORLD)
        dist.all_reduce(part)
        return part + 1

    own = torch.arange(4.0) + rank
    # Traced whole, and run from the graph; without the C++ compiler that inductor would start.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(copy.deepcopy(own)), step(own))


def compiled_by_inductor(rank: int, size: int) -> None:
    """As `torch.compile` does it by default. No feature among the others: its first run starts a C++ compiler on each rank."""
    import torch.distributed._functional_collectives as functional
    from torch._dynamo.utils import counters

    def step(tensor: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(tensor * 2, "sum", dist.group.WORLD)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return total + rank

    own = torch.arange(4.0) + rank
    assert torch.equal(torch.compile(step, fullgraph=True)(own.clone()), sum_of_ranks(size) + rank)
    # Its collectives are calls out of the compiled code, not a fall-back to eager.
    assert counters["inductor"]["extern_calls"] >= 2, counters


def sum_of_ranks(size: int) -> torch.Tensor:
    return sum((torch.arange(4.0) + r for r in range(size)), torch.zeros(4)) * 2


@feature
def pipelines_of_sends(rank: int, size: int) -> None:
    left, right = (rank - 1) % size, (rank + 1) % size
    inbox = [torch.empty(3), torch.empty(2, 2).t()]
    outbox = [torch.full((3,), float(rank)), torch.full((2, 2), rank * 10.0).t()]
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, one, right) for one in outbox] + [dist.P2POp(dist.irecv, one, left) for one in inbox]
    )
    for work in works:
        work.wait()
    assert inbox[0].eq(left).all() and inbox[1].eq(left * 10).all()


@feature
def sparse_tensors(rank: int, size: int) -> None:
    spread = torch.sparse_coo_tensor([[0, rank + 1]], [1.0, 2.0], (size + 1,))
    dist.all_reduce(spread)
    assert spread.to_dense().tolist() == [float(size)] + [2.0] * size


@feature
def works_that_answer(rank: int, size: int) -> None:
    if rank == 0:
        inbox = torch.empty(2)
        assert {dist.recv(inbox) for _ in range(size - 1)} == set(range(1, size))
        work = dist.isend(inbox, dst=1, tag=3)
        work.wait()
        assert work.is_completed()
    else:
        dist.send(torch.full((2,), float(rank)), dst=0)
        if rank == 1:
            work = dist.irecv(torch.empty(2), src=0, tag=3)
            work.wait()
            assert work.is_completed() and work._source_rank() == 0
    work = dist.all_reduce(own := torch.ones(3), async_op=True)
    (got,) = work.get_future().wait()
    assert got.data_ptr() == own.data_ptr() and got.eq(size).all()
