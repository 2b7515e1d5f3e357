"""PyTorch over RDMA in one guest: DDP on queue pairs trains as one process does. Run by scripts/softroce-test.

Importing torch takes most of a minute there: ranks are forked from the process that has done it.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from guests import forked, wires
from torch.nn.parallel import DistributedDataParallel

from gradwire.torch.backend import GradwireBackend


def _model() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10)).double()


def _step(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    return torch.randn(32, 200, dtype=torch.float64), torch.randint(0, 10, (32,))


def _train(rank: int, size: int, url: str) -> tuple[list[np.ndarray], list[str]]:
    dist.init_process_group("gradwire", init_method=f"{url}/store", rank=rank, world_size=size)
    model = DistributedDataParallel(_model())
    inputs, labels = _data()
    _step(model, inputs[rank::size], labels[rank::size])
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert isinstance(backend, GradwireBackend)
    told = wires(backend)  # type: ignore[arg-type]
    dist.destroy_process_group()
    return [parameter.detach().numpy() for parameter in model.parameters()], told


def test_ddp_over_queue_pairs_trains_as_one_process_does() -> None:
    os.environ["GRADWIRE_TRANSPORT"] = "verbs"
    torch.set_num_threads(1)
    ends = forked(2, _train)
    alone = _model()
    _step(alone, *_data())
    for (parameters, told), other in zip(ends, reversed(ends), strict=True):
        assert told == ["verbs"]
        for ours, theirs, single in zip(parameters, other[0], alone.parameters(), strict=True):
            assert ours.tobytes() == theirs.tobytes()
            np.testing.assert_allclose(ours, single.detach().numpy(), rtol=1e-9, atol=1e-12)
