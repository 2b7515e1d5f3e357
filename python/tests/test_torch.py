"""The torch.distributed backend: DDP, torchrun, failures. Its operations are in test_torch_operations."""

from __future__ import annotations

import json
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
from gradwire.torch import GradwireBackend
from ranks import Ranks, run
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def start(rank: int, size: int, url: str, wire: str = "auto", timeout_s: float = 60) -> None:
    os.environ["GRADWIRE_TRANSPORT"] = wire
    dist.init_process_group(
        "gradwire", init_method=f"{url}/torch", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )


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


def asks(rank: int, size: int, url: str, wire: str) -> Any:
    start(rank, size, url, wire)
    for _ in range(2):
        dist.all_reduce(torch.ones(3))
    dist.broadcast(torch.ones(2, dtype=torch.int64), src=1)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    with pytest.raises(ValueError, match="float33"):
        backend.explain("all_reduce", 8, dtype="float33")
    told = backend.describe(), backend.explain("all_reduce", 1 << 20), json.loads(backend.trace()), os.getpid()
    dist.destroy_process_group()
    return told


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_the_backend_describes_explains_and_remembers(wire: str) -> None:
    told = run(2, asks, wire)
    for rank, (description, explanation, trace, pid) in enumerate(told):
        assert (description.rank, description.world_size) == (rank, 2)
        (link,) = description.links
        assert (link.rank, link.pid, link.wire) == (1 - rank, told[1 - rank][-1], wire)
        assert f"rank {link.rank} (host {link.host}, pid {link.pid}) by {wire}: {link.reason}" in str(description)
        assert ("one shared segment" if wire == "shm" else "measured") in description.collectives
        names = [name for name, _ in explanation.expected_us]
        assert explanation.algorithm == ("segment" if wire == "shm" else names[0]) and "ring" in names
        assert str(explanation).startswith(f"{explanation.algorithm}: {explanation.reason}")
        assert (trace["rank"], trace["verdict"], trace["members"][rank]["pid"]) == (rank, None, pid)
        assert [(one["number"], one["call"], one["well"]) for one in trace["records"]] == [
            (0, "all_reduce sum of 3 float32", True),
            (1, "all_reduce sum of 3 float32", True),
            (2, "broadcast of 2 int64 with root 1", True),
        ]


def beside(rank: int, size: int, url: str, other: str) -> tuple[str, ...]:
    if other == "nccl":
        # PyTorch refuses to make NCCL's groups where there is no GPU: Gloo's answer to the name.
        kind = dist.ProcessGroup.BackendType.NCCL
        dist.Backend.register_backend("nccl", c10d._create_gloo_process_group, True, ["cuda"], _backend_type=kind)
    foreign = c10d.C10DBackend.Options(other, timeout=timedelta(seconds=7))
    dist.init_process_group(
        f"cpu:gradwire,cuda:{other}",
        init_method=f"{url}/torch",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
        pg_options=None if other == "gradwire" else foreign,
    )
    cpu = torch.device("cpu")
    backends = [dist.group.WORLD._get_backend(device) for device in (cpu, torch.device("cuda"))]
    assert backends[0]._timeout == 60
    dist.all_reduce(own := torch.full((5,), rank + 1.0))
    assert own.eq(size * (size + 1) / 2).all()
    work = dist.broadcast(own := torch.full((5,), float(rank)), src=1, async_op=True)
    work.wait()
    assert own.eq(1).all()
    told: list[Any] = [None] * size
    dist.all_gather_object(told, {"rank": rank})
    assert told == [{"rank": one} for one in range(size)]
    dist.monitored_barrier()
    pair = dist.new_group([0, 1])
    if rank < 2:
        assert isinstance(pair._get_backend(cpu), GradwireBackend)
        dist.all_reduce(own := torch.ones(1), group=pair)
        assert own == 2
    dist.destroy_process_group()
    return tuple(type(backend).__name__ for backend in backends)


@pytest.mark.parametrize("other", ["gradwire", "gloo", "nccl"])
def test_tensors_of_the_host_are_ours_beside_another_backend_for_cuda(other: str) -> None:
    of_cuda = "GradwireBackend" if other == "gradwire" else "ProcessGroupGloo"
    assert run(3, beside, other) == [("GradwireBackend", of_cuda)] * 3


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


DIES_ONCE = """
import os, pathlib, sys
from datetime import timedelta
import torch
import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gradwire", timeout=timedelta(seconds=60))
rank = dist.get_rank()
record = pathlib.Path(sys.argv[1], f"{attempt}.{rank}")
for step in range(1, 4):
    tensor = torch.full((1000,), float(rank + step))
    dist.all_reduce(tensor)
    assert tensor.eq(1 + 2 * step).all(), tensor
    record.write_text(str(step))
    if attempt == 0 and rank == 1:
        os._exit(3)
dist.destroy_process_group()
record.write_text("finished")
"""


def test_a_restart_by_torchrun_comes_together_at_its_first_attempt(tmp_path: pathlib.Path) -> None:
    script, records = tmp_path / "dies_once.py", tmp_path / "records"
    script.write_text(DIES_ONCE)
    records.mkdir()
    torchrun("--max-restarts", "2", str(script), str(records))
    told = {file.name: file.read_text() for file in records.iterdir()}
    # What the survivor of the first attempt has come to depends on when the agent stops it.
    assert told.pop("0.0", "1") == "1"
    assert told == {"0.1": "1", "1.0": "finished", "1.1": "finished"}, "by attempt and rank"
