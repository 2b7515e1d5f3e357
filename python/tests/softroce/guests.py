"""What the tests in guests have in common: ranks that are forked, a server, collectives and training to compare."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradwire
import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "python" / "tests"))
import ranks as _ranks  # noqa: E402

# A guest imports slowly: its ranks are forked from a process that has imported all.
_ranks.CONTEXT = multiprocessing.get_context("fork")


class _Forked:
    """Runs `body(rank, size, url, *arguments)` on ranks that are forked."""

    def __call__(self, size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self.start(size, body, *arguments).results()

    def start(self, size: int, body: Callable[..., Any], *arguments: Any) -> _ranks.Ranks:
        return _ranks.Ranks(size, body, *arguments)


forked = _Forked()


def wires(group: gradwire.Communicator) -> list[str]:
    """By which wire each other rank is reached."""
    return [one.wire for one in group.describe().links]


def exchange_everything(rank: int, size: int, url: str) -> list[str]:
    """Every kind of collective, small and large, checked; the wires it went by."""
    with gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60.0) as group:
        exchange(group)
        return wires(group)


def exchange(group: gradwire.Communicator, elements: tuple[int, ...] = (1, 1000, 3001, 300_000)) -> None:
    """Every kind of collective, with the results that they must have."""
    rank, size = group.rank, group.world_size
    for count in elements:
        ramp = np.arange(count, dtype=np.int64)
        buffer = ramp + rank
        group.all_reduce(buffer)
        assert (buffer == size * ramp + sum(range(size))).all(), f"all_reduce of {count}"
        buffer = ramp * 3 if rank == size - 1 else np.zeros(count, np.int64)
        group.broadcast(buffer, root=size - 1)
        assert (buffer == ramp * 3).all(), f"broadcast of {count}"
        gathered = np.zeros((size, count), np.int64)
        group.all_gather(ramp + 7 * rank, gathered)
        assert all((gathered[other] == ramp + 7 * other).all() for other in range(size)), f"all_gather of {count}"
        parts = np.stack([ramp + other for other in range(size)])
        mine = np.zeros(count, np.int64)
        group.reduce_scatter(parts, mine)
        assert (mine == size * (ramp + rank)).all(), f"reduce_scatter of {count}"
        received = np.zeros((size, count), np.int64)
        group.all_to_all(parts * (rank + 1), received)
        for other in range(size):
            assert (received[other] == (ramp + rank) * (other + 1)).all(), f"all_to_all of {count}"
        half = np.full(count, 0.5 + rank, np.float16)
        group.all_reduce(half, op="avg")
        assert (half == np.float16(0.5 + (size - 1) / 2)).all(), f"average of {count} halves"
    group.barrier()


# Least squares on data that every worker can make: gradients are summed at the servers.
_FEATURES = 5000
_STEPS = 8
_RATE = 0.05


def _gradient(weights: np.ndarray, worker: int, step: int) -> np.ndarray:
    random = np.random.default_rng(1000 * step + worker)
    rows = random.standard_normal((4, _FEATURES)).astype(np.float32) / np.float32(70)
    wanted = rows @ np.ones(_FEATURES, np.float32)
    return (rows.T @ (rows @ weights - wanted)).astype(np.float32)


def truth(workers: int) -> np.ndarray:
    """Where one process ends that does every worker's part, in their order."""
    weights = np.zeros(_FEATURES, np.float32)
    for step in range(_STEPS):
        total = np.zeros(_FEATURES, np.float32)
        for worker in range(workers):
            total += _gradient(weights, worker, step)
        weights -= np.float32(_RATE) * total
    return weights


def train(rank: int, size: int, _url: str, addresses: list[str]) -> np.ndarray:
    """One worker of a training with synchronous servers; the weights it ends with."""
    client = gradwire.connect(addresses, rank=rank, timeout_s=60.0)
    table = client.dense("weights", _FEATURES, rule=gradwire.SGD(lr=_RATE), workers=size)
    weights = np.zeros(_FEATURES, np.float32)
    table.init(weights)
    client.barrier("begin", size)
    for step in range(_STEPS):
        weights = np.asarray(table.push_pull(_gradient(weights, rank, step), np.empty_like(weights)))
    client.barrier("end", size)
    client.close()
    return weights


class _Serve:
    """The server binary, and its end."""

    process: subprocess.Popen[str] | None = None

    @contextmanager
    def __call__(self, shards: int, listen: str = "127.0.0.1:0", *flags: str) -> Iterator[list[str]]:
        binary = os.environ.get("GRADWIRE_PS", str(ROOT / "target" / "release" / "gradwire-ps"))
        command = [binary, "serve", "--json", "--listen", listen, "--shards", str(shards), "--log", "warn", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            self.process = process
            assert process.stdout is not None
            try:
                yield [json.loads(process.stdout.readline())["address"] for _ in range(shards)]
            finally:
                process.kill()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)


serve = _Serve()


def link(name: str, state: str) -> None:
    """Brings a network device up or down."""
    subprocess.run(["ip", "link", "set", name, state], check=True)
