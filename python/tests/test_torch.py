"""The torch.distributed backend: every operation of c10d, DDP, torchrun, failures."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import gradwire
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


def start(rank: int, size: int, url: str, wire: str = "auto", timeout_s: float = 60) -> None:
    os.environ["GRADWIRE_TRANSPORT"] = wire
    dist.init_process_group(
        "gradwire", init_method=f"{url}/torch", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )


def every_operation(rank: int, size: int, url: str, wire: str) -> None:
    start(rank, size, url, wire)
    everyone = range(size)
    for dtype in DTYPES:
        own = torch.arange(12).reshape(3, 4).to(dtype) + rank
        total = sum(torch.arange(12).reshape(3, 4) + r for r in everyone).to(dtype)
        got = own.clone()
        dist.all_reduce(got)
        assert torch.equal(got, total), dtype
        got = own.clone().t()
        work = dist.all_reduce(got, op=dist.ReduceOp.MAX, async_op=True)
        work.wait()
        assert torch.equal(got, (own - rank + size - 1).t()), "not contiguous"
        parts = [torch.empty_like(own) for _ in everyone]
        dist.all_gather(parts, own)
        assert all(torch.equal(part, own - rank + r) for r, part in enumerate(parts))
        flat = torch.empty(size * 3, 4, dtype=dtype)
        dist.all_gather_into_tensor(flat, own)
        assert torch.equal(flat, torch.cat(parts))
        out = torch.empty(3, 4, dtype=dtype)
        dist.reduce_scatter_tensor(out, torch.cat([own] * size))
        assert torch.equal(out, total)
        dist.reduce_scatter(out, [own + 1 for _ in everyone])
        assert torch.equal(out, total + size)
        dist.broadcast(got := own.clone(), src=size - 1)
        assert torch.equal(got, own - rank + size - 1)
        dist.reduce(got := own.clone(), dst=0)
        assert torch.equal(got, total if rank == 0 else own)
        gathered = [torch.empty_like(own) for _ in everyone] if rank == 0 else None
        dist.gather(own, gathered, dst=0)
        assert rank > 0 or all(torch.equal(a, b) for a, b in zip(gathered, parts, strict=True))
        dist.scatter(out, parts if rank == 0 else None, src=0)
        assert torch.equal(out, own)
        swapped = torch.empty(size, 2, dtype=dtype)
        dist.all_to_all_single(swapped, torch.full((size, 2), rank).to(dtype))
        assert torch.equal(swapped[:, 0], torch.arange(size).to(dtype))
    uneven(rank, size)
    odd_types(rank, size)
    objects_and_groups(rank, size)
    dist.destroy_process_group()


def uneven(rank: int, size: int) -> None:
    outs = [torch.empty(r + rank) for r in range(size)]
    dist.all_to_all(outs, [torch.full((r + rank,), rank * 10.0 + r) for r in range(size)])
    assert all((out == r * 10 + rank).all() for r, out in enumerate(outs))
    out = torch.empty(sum(r + rank for r in range(size)), 2)
    splits = [r + rank for r in range(size)]
    dist.all_to_all_single(out, torch.full((sum(splits), 2), float(rank)), splits, splits)
    assert all((part == r).all() for r, part in enumerate(out.split(splits)))
    parts = [torch.empty(r + 1, 3) for r in range(size)]
    dist.all_gather(parts, torch.full((rank + 1, 3), float(rank)))
    assert all((part == r).all() for r, part in enumerate(parts))


def odd_types(rank: int, size: int) -> None:
    flag = torch.tensor([rank == 0, False])
    dist.all_reduce(flag)
    assert flag.tolist() == [True, False]
    number = torch.tensor([1 + 2j]) * (rank + 1)
    dist.all_reduce(number)
    assert number.item() == (1 + 2j) * sum(range(1, size + 1))
    small = torch.full((4,), float(rank + 1)).to(torch.float8_e4m3fn)
    dist.broadcast(small, src=0)
    assert (small.float() == 1).all(), "moved as bytes"
    scaled = torch.ones(4)
    dist.all_reduce(scaled, op=dist._make_nccl_premul_sum(0.5) if hasattr(dist, "_make_nccl_premul_sum") else dist.ReduceOp.AVG)
    assert scaled[0] in (1.0, size * 0.5)
    spread = torch.sparse_coo_tensor([[0, rank + 1]], [1.0, 2.0], (size + 1,))
    dist.all_reduce(spread)
    assert spread.to_dense().tolist() == [float(size)] + [2.0] * size
    for empty in (torch.empty(0), torch.tensor(3.0)):
        dist.all_reduce(empty)
    assert empty == 3 * size


def objects_and_groups(rank: int, size: int) -> None:
    told: list[Any] = [None] * size
    dist.all_gather_object(told, {"rank": rank})
    assert told == [{"rank": r} for r in range(size)]
    box = ["from the last" if rank == size - 1 else None]
    dist.broadcast_object_list(box, src=size - 1)
    assert box == ["from the last"]
    pair = dist.new_group([0, 1])
    if rank < 2:
        one = torch.ones(1)
        dist.all_reduce(one, group=pair)
        assert one == 2
    if rank == 0:
        inbox = torch.empty(2)
        sources = {dist.recv(inbox) for _ in range(size - 1)}
        assert sources == set(range(1, size))
        work = dist.isend(inbox, dst=1, tag=3)
        work.wait()
        assert work.is_completed()
    else:
        dist.send(torch.full((2,), float(rank)), dst=0)
        if rank == 1:
            work = dist.irecv(torch.empty(2), src=0, tag=3)
            work.wait()
            assert work.is_completed() and work._source_rank() == 0
    dist.monitored_barrier(timeout=timedelta(seconds=20))
    dist.barrier()


@pytest.mark.parametrize(("size", "wire"), [(2, "shm"), (2, "tcp"), (3, "shm"), (4, "tcp")])
def test_every_operation_of_c10d(size: int, wire: str) -> None:
    run(size, every_operation, wire)


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def train(net: nn.Module, rank: int, size: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        images, labels = torch.randn(12, 1, 8, 8, generator=generator), torch.randint(0, 10, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rank::size]), labels[rank::size]).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def ddp(rank: int, size: int, url: str, wire: str) -> tuple[list[Any], float]:
    torch.set_num_threads(1)
    start(rank, size, url, wire)
    # Small buckets: several are under way at once.
    trained = train(DistributedDataParallel(model(), bucket_cap_mb=0.001), rank, size)
    alone = train(model(), 0, 1)
    difference = max((a - b).abs().max().item() for a, b in zip(trained, alone, strict=True))
    dist.destroy_process_group()
    return [parameter.numpy().tobytes() for parameter in trained], difference


@pytest.mark.parametrize(("size", "wire"), [(2, "shm"), (2, "tcp"), (3, "tcp")])
def test_ddp_holds_the_same_bits_on_every_rank_and_trains_as_one_process_does(size: int, wire: str) -> None:
    results = run(size, ddp, wire)
    assert all(bits == results[0][0] for bits, _ in results)
    assert results[0][1] < 1e-5


def hooks(rank: int, size: int, url: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    torch.set_num_threads(1)
    start(rank, size, url)
    halves = DistributedDataParallel(model())
    halves.register_comm_hook(None, default_hooks.bf16_compress_hook)
    train(halves, rank, size)
    # Its callbacks start and wait for further collectives; with several buckets their order would be anybody's.
    ranked = DistributedDataParallel(model())
    ranked.register_comm_hook(powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2), powerSGD_hook.powerSGD_hook)
    train(ranked, rank, size)
    dist.destroy_process_group()


def test_communication_hooks_may_wait_inside_callbacks() -> None:
    run(2, hooks)


def until_it_fails(rank: int, size: int, url: str, gate: str) -> Any:
    start(rank, size, url)
    net = DistributedDataParallel(nn.Linear(300, 300))
    net(torch.ones(4, 300)).sum().backward()
    pathlib.Path(f"{gate}.{rank}").touch()
    try:
        while True:
            net(torch.ones(4, 300)).sum().backward()
    except RuntimeError as error:
        return time.time(), str(error)


def test_a_killed_rank_is_named_in_the_error_of_backward(tmp_path: Any) -> None:
    gate = str(tmp_path / "at-work")
    ranks = Ranks(3, until_it_fails, gate)
    deadline = time.monotonic() + 60
    while not all(os.path.exists(f"{gate}.{rank}") for rank in range(3)):
        assert time.monotonic() < deadline, "the ranks did not meet"
        time.sleep(0.01)
    killed = ranks.kill(1)
    for result in filter(None, ranks.results(but=1)):
        when, text = result
        assert "rank 1" in text and f"pid {ranks.processes[1].pid}" in text
        assert when - killed < 0.3, f"{when - killed:.3f} s: {text}"


def aborts(rank: int, size: int, url: str) -> None:
    start(rank, size, url)
    dist.barrier()
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    if rank == 0:
        work = dist.all_reduce(torch.ones(1), async_op=True)
        threading.Timer(0.1, backend.abort).start()
        with pytest.raises(gradwire.GroupAbortedError, match="rank 0"):
            work.wait()
    else:
        with pytest.raises(gradwire.GroupAbortedError, match="rank 0"):
            while True:
                dist.recv(torch.empty(1), src=0)
    assert backend.get_error() != torch._C._distributed_c10d.ErrorType.SUCCESS


def test_abort_wakes_who_waits() -> None:
    run(2, aborts)


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_torchrun_trains_the_digits_without_an_import_of_ours() -> None:
    script = EXAMPLES / "ddp_digits.py"
    assert "import gradwire" not in script.read_text()
    last = torchrun(str(script), "--epochs", "8").strip().splitlines()[-1]
    accuracy = float(last.rsplit(" ", 1)[1].rstrip("%"))
    assert accuracy >= 95, last


def test_torchrun_leads_a_communicator_by_its_environment(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(
        "import numpy, gradwire\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gradwire')\n"
        "store = dist.distributed_c10d._get_default_store()\n"
        "with gradwire.Communicator(store=store, rank=dist.get_rank(), world_size=2, name='beside') as group:\n"
        "    assert group.all_reduce(numpy.ones(3))[0] == 2\n"
        "    print('met', flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    assert torchrun(str(script)).count("met") == 2
