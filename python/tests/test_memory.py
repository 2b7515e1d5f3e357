"""Memory that the backend gives to PyTorch: where it lies, that it comes back, and that FSDP2 trains in it."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import Any

import gradwire
import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard


def backend(rank: int, size: int, url: str, wire: str) -> Any:
    os.environ["GRADWIRE_TRANSPORT"] = wire
    dist.init_process_group(
        "gradwire", init_method=f"{url}/torch", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    return dist.group.WORLD._get_backend(torch.device("cpu"))


def allocates(rank: int, size: int, url: str) -> None:
    ours = backend(rank, size, url, "tcp")
    assert ours.supports_tensor_alloc(torch.device("cpu")) and not ours.supports_tensor_alloc(torch.device("cuda:0"))
    sizes = [1, 3000, 1 << 20]
    seen = []
    for _ in range(3):
        tensors = [ours.allocate_tensor(n, dtype=torch.bfloat16, device=torch.device("cpu")) for n in sizes]
        assert [tensor.numel() for tensor in tensors] == sizes
        seen.append([tensor.data_ptr() for tensor in tensors])
        assert all(place % 4096 == 0 for place in seen[-1])
        views = [tensor.fill_(rank + 1)[:1] for tensor in tensors]
        del tensors
        gc.collect()
        other = ours.allocate_tensor(3000, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert other.data_ptr() not in seen[-1], "a view holds the memory"
        for view in views:
            dist.all_reduce(view)
            assert view.item() == 3
        del view, views, other
    assert len({place for places in seen for place in places}) <= 4, "what is given back serves again"
    assert ours.allocate_tensor(0, dtype=torch.float32, device="cpu").numel() == 0
    with pytest.raises(ValueError, match="host memory"):
        ours.allocate_tensor(1, dtype=torch.float32, device="cuda:0")
    with pytest.raises(gradwire.TransportError, match="allocate"):
        ours.allocate_tensor(1 << 60, dtype=torch.uint8, device="cpu")
    kept = ours.allocate_tensor(10, dtype=torch.float32, device="cpu").fill_(7)
    dist.destroy_process_group()
    del ours
    gc.collect()
    assert kept.tolist() == [7] * 10, "a tensor outlives its group"




def test_tensors_of_the_group_begin_on_pages_and_come_back() -> None:
    run(2, allocates)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))


def trains(rank: int, size: int, url: str, wire: str) -> tuple[int, set[int], list[float]]:
    ours = backend(rank, size, url, wire)
    taken: list[int] = []
    allocate = ours.allocate_tensor

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        taken.append(tensor.data_ptr())
        return tensor

    ours.allocate_tensor = counted
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
        layer.set_allocate_memory_from_process_group_for_comm(True)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(6):
        torch.manual_seed(100 + step)
        inputs, targets = torch.randn(8, 20), torch.randint(0, 5, (8,))
        loss = nn.functional.cross_entropy(model(inputs[rank::size]), targets[rank::size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach().clone(), op=dist.ReduceOp.AVG)
        losses.append(total.item())
    dist.destroy_process_group()
    return len(taken), set(taken), losses


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_fsdp2_takes_its_buffers_from_the_group_and_trains(wire: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step in range(6):
        torch.manual_seed(100 + step)
        inputs, targets = torch.randn(8, 20), torch.randint(0, 5, (8,))
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for count, places, losses in run(2, trains, wire):
        assert count >= 6 * 4, "two layers, forward and backward, each step"
        assert len(places) <= 8, f"{count} buffers in {len(places)} places: memory is used again"
        assert losses == pytest.approx(expected, abs=1e-5)
