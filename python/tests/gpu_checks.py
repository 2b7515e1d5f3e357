"""CUDA tensors of PyTorch on a real driver; run by scripts/test-gpu, where there is a GPU. Each check prints its name or raises."""

from __future__ import annotations

import copy
import datetime
import os
import sys
import tempfile
from typing import Any

import gradwire
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwire.torch import EmbeddingBag

RANKS = 2
LENGTHS = [0, 1, 1000, 3_000_001]


def own(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that tell rank and place, of which every sum is exact."""
    return ((torch.arange(length) * 7 + rank * 3) % 5 + 1).to(dtype)


def check_communicator(rank: int, device: torch.device, folder: str) -> None:
    with gradwire.Communicator(f"file://{folder}/c", rank=rank, world_size=RANKS, transport="tcp") as group:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
            for length in LENGTHS:
                tensor = own(rank, length, dtype).to(device)
                total = sum(own(one, length, dtype) for one in range(RANKS))
                group.all_reduce(tensor)
                assert torch.equal(tensor.cpu(), total), (dtype, length)
                coming = group.recv(tensor, 1 - rank, async_op=True)
                group.send(own(rank, length, dtype).to(device), 1 - rank)
                coming.wait()
                assert torch.equal(tensor.cpu(), own(1 - rank, length, dtype)), (dtype, length)
        print(group.describe())


def check_lent(rank: int, device: torch.device, folder: str) -> None:
    """Long calls of ranks on one host: from device to device, in the bits that the host makes; nothing is left on the device."""
    check_folds(rank, device, f"{folder}/l", "from device to device by CUDA IPC")


def check_brought(rank: int, device: torch.device, folder: str) -> None:
    """The same where devices reach no other: what a rank folds is brought to its device."""
    os.environ["GRADWIRE_CUDA_DIRECT"] = "0"
    check_folds(rank, device, f"{folder}/b", "for what is brought to the device")
    del os.environ["GRADWIRE_CUDA_DIRECT"]


def check_folds(rank: int, device: torch.device, folder: str, way: str) -> None:
    os.environ["GRADWIRE_CUDA_REDUCE"] = "device"
    length, folds = 9_000_001, (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
    with gradwire.Communicator(f"file://{folder}", rank=rank, world_size=RANKS, deterministic=True) as group:
        for dtype in folds:
            generator = torch.Generator().manual_seed(rank)
            odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 65504.0])
            given = torch.randn(length, generator=generator) * 100
            if dtype.is_floating_point:
                given[:: 101 + rank] = odd[torch.arange(len(given[:: 101 + rank])) % len(odd)]
            given = given.to(dtype)
            for op in ("sum", "avg", "product", "min", "max"):
                there, here = given.to(device), given.clone()
                group.all_reduce(there, op=op)
                group.all_reduce(here, op=op)
                whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
                assert torch.equal(there.cpu().view(whole), here.view(whole)), (dtype, op)
        told = group.describe().devices[1]
        assert way in told and "folded there" in told, told
        print(told)
    del os.environ["GRADWIRE_CUDA_REDUCE"]
    with gradwire.Communicator(f"file://{folder}m", rank=rank, world_size=RANKS) as group:
        group.all_reduce(torch.ones(length, device=device))
        print(group.describe().devices[-1])


def check_memory_is_given_back(rank: int, device: torch.device, folder: str) -> None:
    """Groups that come and go leave as much of the device's memory as there was."""
    torch.cuda.synchronize(device)
    left = []
    for turn in range(5):
        with gradwire.Communicator(f"file://{folder}/m{turn}", rank=rank, world_size=RANKS) as group:
            group.all_reduce(torch.ones(9_000_001, device=device))
        dist.barrier()
        torch.cuda.empty_cache()
        left.append(torch.cuda.mem_get_info(device)[0])
        dist.barrier()
    assert left[-1] >= left[1] - (8 << 20), left


def check_streams(rank: int, device: torch.device) -> None:
    """A kernel before and one after, on a stream of our own, and no wait of the host between them."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        tensor = torch.zeros(3_000_001, device=device)
        for step in range(10):
            torch.cuda._sleep(10_000_000)
            tensor.fill_(step + rank)
            dist.all_reduce(tensor, async_op=True).wait()
            tensor.mul_(2)
            seen = tensor.clone()
    stream.synchronize()
    assert torch.equal(seen.cpu(), torch.full((3_000_001,), 2.0 * (2 * 9 + 1)))


def check_collectives(rank: int, device: torch.device) -> None:
    for length in LENGTHS:
        mine = own(rank, length, torch.float32).to(device)
        parts = torch.empty(RANKS * length, device=device)
        dist.all_gather_into_tensor(parts, mine)
        assert torch.equal(parts.cpu(), torch.cat([own(one, length, torch.float32) for one in range(RANKS)]))
        part = torch.empty(length, device=device)
        dist.reduce_scatter_tensor(part, parts)
        assert torch.equal(part.cpu(), RANKS * own(rank, length, torch.float32))
        dist.broadcast(part, 1)
        assert torch.equal(part.cpu(), RANKS * own(1, length, torch.float32))
        back = torch.empty_like(parts)
        dist.all_to_all_single(back, parts)
        assert torch.equal(back.cpu(), own(rank, length, torch.float32).repeat(RANKS))


def check_ddp(rank: int, device: torch.device) -> None:
    """The same training on the GPU through DDP, and on the CPU with both ranks' batches in one process."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    model = DistributedDataParallel(copy.deepcopy(plain).to(device), device_ids=[device.index])
    ours, theirs = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, plain))
    for _ in range(5):
        batches = torch.randn(RANKS, 16, 32)
        model(batches[rank].to(device)).square().mean().backward()
        plain(batches.flatten(0, 1)).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-3, atol=1e-5)


def check_parameter_server(device: torch.device) -> None:
    with gradwire.LocalCluster(2) as cluster, cluster.connect(rank=0) as client:
        table = client.dense("weights", (100_003,), "float32", workers=1)
        table.init(torch.zeros(100_003, device=device))
        table.push(torch.ones(100_003, device=device))
        out = torch.empty(100_003, device=device)
        table.pull(out)
        assert torch.equal(out.cpu(), torch.ones(100_003))


def check_embeddings(device: torch.device) -> None:
    """The same lookups, and gradients, as PyTorch's own bag has on the GPU."""
    with gradwire.LocalCluster(2) as cluster, cluster.connect() as client:
        bag = EmbeddingBag(None, 16, client, name="bag", mode="sum", initializer=gradwire.Uniform())
        first = torch.from_numpy(bag.table.pull(range(1000)))
        theirs = nn.EmbeddingBag.from_pretrained(first.to(device), freeze=False, mode="sum")
        ids = torch.randint(0, 1000, (64, 20), device=device)
        bag.prefetch(ids)
        pooled = bag(ids)
        assert pooled.device == ids.device
        torch.testing.assert_close(pooled, theirs(ids))
        pooled.sum().backward()
        theirs(ids).sum().backward()
        bag.synchronize()
        gained = torch.from_numpy(bag.table.pull(range(1000))) - first
        torch.testing.assert_close(gained, theirs.weight.grad.cpu(), rtol=1e-4, atol=1e-4)


def rank_main(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    steps: list[Any] = [
        ("communicator", lambda: check_communicator(rank, device, folder)),
        ("devices that lend each other memory", lambda: check_lent(rank, device, folder)),
        ("devices that are brought what they fold", lambda: check_brought(rank, device, folder)),
    ]
    dist.init_process_group(
        "gradwire", init_method=f"file://{folder}/t", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    steps += [
        ("memory is given back", lambda: check_memory_is_given_back(rank, device, folder)),
        ("collectives of torch.distributed", lambda: check_collectives(rank, device)),
        ("streams, without a wait of the host", lambda: check_streams(rank, device)),
        ("DDP", lambda: check_ddp(rank, device)),
        ("parameter server", lambda: check_parameter_server(device)),
        ("embeddings", lambda: check_embeddings(device)),
    ]
    for name, step in steps:
        step()
        print(f"rank {rank}: {name}: good", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is there: this is for a machine with an NVIDIA GPU")
    os.environ.setdefault("GRADWIRE_TIMEOUT", "60")
    with tempfile.TemporaryDirectory() as meeting:
        processes.spawn(rank_main, (meeting,), RANKS)
