"""One-sided reads and writes by an RDMA device, between two processes, without PyTorch. For a host that has a device:

    scripts/softroce-vm -- .venv/bin/python python/tests/guest_one_sided.py
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import tempfile
import time
from typing import Any

import gradwire
import numpy
from gradwire import Config, _native

SIZES = [1, 1000, 65_536, (1 << 20) + 3, 8 << 20]
PATIENCE_S = 60.0


def endpoint(wire: str) -> _native.OneSided:
    return _native.OneSided.open(timeout_s=PATIENCE_S, options=Config.from_environment(transport=wire).options())


def wait(transfer: _native.Transfer) -> None:
    assert transfer.wait(PATIENCE_S), "it has not ended"


def owner(pipe: Any, wire: str) -> None:
    """Offers memory, then says what became of it, until it is killed."""
    ours = endpoint(wire)
    memory = numpy.arange(SIZES[-1], dtype=numpy.uint8)
    registered = ours.register(memory)
    pipe.send((ours.bind(), ours.expose(registered, PATIENCE_S), os.getpid()))
    while True:
        first, length = pipe.recv()
        if length > 0:
            pipe.send(memory[first : first + length].tobytes())
            continue
        assert ours.unregister(registered, PATIENCE_S)
        registered = ours.register(memory)
        pipe.send(ours.expose(registered, PATIENCE_S))


def reach(wire: str) -> str:
    spawn = multiprocessing.get_context("spawn")
    pipe, far = spawn.Pipe()
    process = spawn.Process(target=owner, args=(far, wire), daemon=True)
    process.start()
    far.close()
    assert pipe.poll(PATIENCE_S), "the owner did not come"
    url, told, pid = pipe.recv()
    ours = endpoint(wire)
    ours.connect(url, PATIENCE_S)
    how = ours.describe()
    assert how["wire"] == wire, how
    local = numpy.empty(SIZES[-1], numpy.uint8)
    registered = ours.register(local)
    for seed, size in enumerate(SIZES):
        local[:size] = (numpy.arange(size) * 7 + seed) % 251
        expected = local[:size].copy()
        wait(ours.write(registered, 0, size, told))
        pipe.send((0, size))
        assert pipe.poll(PATIENCE_S) and pipe.recv() == expected.tobytes(), f"{size} bytes written"
        local[:] = 0
        wait(ours.read(registered, 0, size, told))
        assert (local[:size] == expected).all() and not local[size:].any(), f"{size} bytes read"
    many = [ours.write(registered, 4096 * at, 4096, told) for at in range(200)]
    for transfer in many:
        wait(transfer)
    refused(wire, url, told, SIZES[-1] - 10)
    pipe.send((0, 0))
    assert pipe.poll(PATIENCE_S), "the memory was not withdrawn"
    anew = pipe.recv()
    refused(wire, url, told, 0)
    wait(ours.read(registered, 0, 100, anew))
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            wait(ours.read(registered, 0, 100, anew))
    except gradwire.TransportError as error:
        took = time.monotonic() - began
        assert took < 20 and str(pid) in str(error), f"{took:.1f} s"
        assert not ours.connected()
        print(f"{wire}: the peer's end: {error} (after {took:.2f} s)")
    ours.close(5)
    process.join(10)
    return str(how["text"])


def refused(wire: str, url: bytes, told: bytes, offset: int) -> None:
    """A forged place, or one that was withdrawn, is refused; it ends no connection but the one that it came by."""
    words = list(struct.unpack("<5Q", told[4:]))
    words[2] = offset
    stranger = endpoint(wire)
    stranger.connect(url, PATIENCE_S)
    own = stranger.register(numpy.ones(100, numpy.uint8))
    for attempt in (stranger.write, stranger.read):
        try:
            wait(attempt(own, 0, 100, told[:4] + struct.pack("<5Q", *words)))
        except gradwire.TransportError as error:
            assert "exposed" in str(error), error
            continue
        raise AssertionError("an access outside of the memory went through")
    stranger.close(5)


def member(rank: int, folder: str, pipe: Any) -> None:
    with gradwire.Communicator(f"file://{folder}", rank=rank, world_size=2, transport="verbs", timeout_s=60) as group:
        places = set()
        for _ in range(5):
            memory = group._group.allocate(4 << 20)
            places.add(numpy.frombuffer(memory, numpy.uint8).ctypes.data)
            numbers = numpy.frombuffer(memory, numpy.float32)
            numbers[:] = rank + 1
            group.all_reduce(numbers)
            assert (numbers == 3).all()
            del memory, numbers
        pipe.send((len(places), group.describe().links[0].wire))


def memory_of_a_group() -> None:
    """Memory that a group hands out, which its device knows from the start, is reduced and used again."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        for rank in range(2):
            ours, theirs = spawn.Pipe(duplex=False)
            spawn.Process(target=member, args=(rank, folder, theirs), daemon=True).start()
            pipes.append(ours)
        for ours in pipes:
            assert ours.poll(PATIENCE_S) and ours.recv() == (1, "verbs")


if __name__ == "__main__":
    memory_of_a_group()
    for wire in ("verbs", "tcp"):
        print(f"{wire}: {reach(wire)}", flush=True)
    print("one-sided: all is well")
