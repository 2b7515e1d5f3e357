"""Runs a function on several ranks, each a process of its own, and brings back what each returns or raises."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

#: How ranks are started.
CONTEXT: Any = multiprocessing.get_context("spawn")
_DEADLINE_S = 100.0


class Failed(Exception):
    """A rank raised; its traceback is the message."""


def _rank(body: Callable[..., Any], rank: int, size: int, folder: str, pipe: Any, arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, body(rank, size, f"file://{folder}", *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


class Ranks:
    """`size` processes that run `body(rank, size, url, *arguments)`."""

    def __init__(self, size: int, body: Callable[..., Any], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gradwire-test-")
        self._pipes = []
        self.processes = []
        self._stopped: list[Any] = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_rank, args=(body, rank, size, self._folder.name, theirs, arguments))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def kill(self, rank: int) -> float:
        """Kills `rank` as `kill -9` does; returns the time of it."""
        pid = self.processes[rank].pid
        assert pid is not None
        now = time.time()
        os.kill(pid, signal.SIGKILL)
        return now

    def stop(self, rank: int) -> float:
        """Stops `rank` as a debugger does: it lives, its connections stay open, and it does nothing; returns the time of it."""
        process = self.processes[rank]
        assert process.pid is not None
        self._stopped.append(process)
        now = time.time()
        os.kill(process.pid, signal.SIGSTOP)
        return now

    def results(self, but: int | None = None) -> list[Any]:
        """What every rank but `but` returned (None for that one); a rank that raised or did not end is an error here."""
        deadline = time.monotonic() + _DEADLINE_S
        results: list[Any] = []
        try:
            for rank, pipe in enumerate(self._pipes):
                if rank == but:
                    results.append(None)
                    continue
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise Failed(f"rank {rank} did not end within {_DEADLINE_S} s")
                try:
                    good, value = pipe.recv()
                except EOFError:
                    raise Failed(f"rank {rank} died") from None
                if not good:
                    raise Failed(f"rank {rank}:\n{value}")
                results.append(value)
        finally:
            for process in self._stopped:
                process.kill()
            for process in self.processes:
                process.join(10)
                process.kill()
            self._folder.cleanup()
        return results


def run(size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `body(rank, size, url, *arguments)` on `size` ranks; what each returned, by rank."""
    return Ranks(size, body, *arguments).results()
