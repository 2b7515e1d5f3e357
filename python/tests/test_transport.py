"""One-sided reads and writes through torch.distributed's transports, between real processes."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from datetime import timedelta
from typing import Any

import gradwire
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, run
from torch.distributed._transport import available_transports, new_transport, new_transport_rank


class Pair:
    """This rank's transport to the other one, and a store to talk by."""

    def __init__(self, rank: int, url: str) -> None:
        os.environ["GRADWIRE_TRANSPORT"] = "tcp"
        self.rank = rank
        self.store = dist.FileStore(os.path.join(url.removeprefix("file://"), "store"), 2)
        self.store.set_timeout(timedelta(seconds=60))
        self.transport = new_transport_rank("gradwire", "cpu", store=self.store, peer_rank=1 - rank, rank=rank)

    def swap(self, name: str, value: bytes) -> bytes:
        self.store.set(f"{name}/{self.rank}", value)
        return self.store.get(f"{name}/{1 - self.rank}")

    def offer(self, name: str, tensor: torch.Tensor) -> tuple[Any, Any]:
        """`tensor` registered, and what the other rank has registered under the same name."""
        memory = self.transport.register_memory(tensor)
        mine = memory.to_remote_buffer()
        return memory, type(mine).deserialize(self.swap(name, mine.serialize()))


def exchanges(rank: int, size: int, url: str) -> None:
    assert "gradwire" in available_transports()
    pair = Pair(rank, url)
    transport = pair.transport
    assert transport.connected() and transport.describe()["wire"] == "tcp"
    assert "by messages over TCP" in repr(transport) and "GRADWIRE_TRANSPORT=tcp" in repr(transport)
    own = torch.arange(3 << 20, dtype=torch.float32) + rank
    inbox, space = torch.zeros(3 << 20), torch.empty(3 << 20)
    source, remote_own = pair.offer("own", own)
    _, remote_inbox = pair.offer("inbox", inbox)
    landing = transport.register_memory(space)
    # In one call, as work, by a future, and in asyncio.
    assert transport.write(source.to_view(), remote_inbox) == 0
    pair.swap("written", b"")
    assert torch.equal(inbox, torch.arange(3 << 20, dtype=torch.float32) + 1 - rank)
    work = transport.read(landing.to_mutable_view(), remote_own, async_op=True)
    assert work.wait() and work.is_completed() and work.is_success()
    assert torch.equal(space, inbox)
    works = [transport.read(landing.to_mutable_view(at * 4, 4), remote_own, async_op=True) for at in range(50)]
    assert torch.futures.wait_all([work.get_future() for work in works]) == [[]] * 50
    assert (space[:50] == 1 - rank).all(), "each has read the first number"
    pair.swap("read", b"")

    async def many() -> None:
        views = [source.to_view(at * 1024, 1024) for at in range(20)]
        await asyncio.gather(*(transport.write_async(view, remote_inbox, timeout=30) for view in views))
        await transport.read_async(landing.to_mutable_view(), remote_own)

    asyncio.run(many())
    assert torch.equal(space, torch.arange(3 << 20, dtype=torch.float32) + 1 - rank)
    pair.swap("done", b"")
    asyncio.run(transport.close_async(timeout=10))
    assert not transport.connected()
    with pytest.raises(RuntimeError, match="closed"):
        transport.write(source.to_view(), remote_inbox)


def test_tensors_are_read_and_written_in_every_form() -> None:
    run(2, exchanges)


def reaches_outside(rank: int, size: int, url: str) -> None:
    pair = Pair(rank, url)
    memory, remote = pair.offer("memory", torch.zeros(1000))
    if rank == 0:
        told = remote.serialize()
        owner, key, offset, length, device = struct.unpack("<5Q", told[4:])
        for name, forged in [("past", (owner, key, 3000, 2000, device)), ("stale", (owner, key ^ 1, 0, 100, device))]:
            fresh = new_transport("gradwire", "cpu")
            fresh.connect(pair.store.get("url"))
            local = fresh.register_memory(torch.ones(25))
            buffer = type(remote).deserialize(told[:4] + struct.pack("<5Q", *forged))
            work = fresh.write(local.to_view(), buffer, async_op=True)
            if name == "past":
                # The first 100 bytes of what was forged do lie inside.
                assert work.wait()
                longer = fresh.register_memory(torch.ones(500))
                work = fresh.read(longer.to_mutable_view(), buffer, async_op=True)
            with pytest.raises(gradwire.TransportError, match="outside of the memory that is exposed"):
                work.wait()
            failed = work.get_future()
            with pytest.raises(RuntimeError, match="outside of the memory"):
                failed.wait()
            with pytest.raises(gradwire.TransportError, match="outside of the memory"):
                asyncio.run(fresh.write_async(local.to_view(), remote))
            assert not fresh.connected()
            fresh.close()
        assert pair.transport.read(memory.to_mutable_view(), remote) == 0, "other connections go on"
    else:
        pair.store.set("url", pair.transport.bind())
    pair.swap("forged", b"")
    if rank == 1:
        pair.transport.unregister_memory(memory)
        pair.transport.unregister_memory(memory)
        with pytest.raises(RuntimeError, match="unregistered"):
            memory.to_view()
    pair.swap("unregistered", b"")
    if rank == 0:
        with pytest.raises(gradwire.TransportError, match="outside of the memory that is exposed"):
            pair.transport.read(memory.to_mutable_view(), remote)
    pair.swap("done", b"")
    pair.transport.close()


def test_an_access_outside_of_registered_memory_ends_the_connection_with_the_reason() -> None:
    run(2, reaches_outside)


def reads_until_it_fails(rank: int, size: int, url: str, gate: str) -> tuple[float, str] | None:
    pair = Pair(rank, url)
    memory, remote = pair.offer("memory", torch.zeros(1 << 20))
    if rank == 1:
        while True:
            time.sleep(1)
    with pytest.raises(gradwire.TransportError) as caught:
        while True:
            pair.transport.read(memory.to_mutable_view(), remote, timeout=60)
            open(gate, "w").close()
    when = time.time()
    assert not pair.transport.connected()
    pair.transport.close()
    return when, str(caught.value)


def test_a_killed_peer_is_told_of_at_once(tmp_path: Any) -> None:
    gate = str(tmp_path / "reading")
    ranks = Ranks(2, reads_until_it_fails, gate)
    deadline = time.monotonic() + 60
    while not os.path.exists(gate):
        assert time.monotonic() < deadline, "nothing was read"
        time.sleep(0.01)
    killed = ranks.kill(1)
    when, text = ranks.results(but=1)[0]
    assert f"pid {ranks.processes[1].pid}" in text and ("died" in text or "broke" in text), text
    assert when - killed < 10, f"{when - killed:.3f} s"


def test_what_makes_no_sense_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_TRANSPORT", "tcp")
    with new_transport("gradwire", "cpu") as one, new_transport("gradwire") as other:
        assert one.bind() == one.bind() and not one.connected() and "not connected" in repr(one)
        memory, far = one.register_memory(torch.zeros(10)), other.register_memory(torch.zeros(5))
        remote = far.to_remote_buffer()
        with pytest.raises(RuntimeError, match="connect"):
            one.write(memory.to_view(0, 4), remote)
        assert one.connect(other.bind(), timeout=20) == 0
        with pytest.raises(RuntimeError, match="connected already"):
            one.connect(other.bind())
        for offset, length in [(41, None), (-1, 1), (30, 20), (0, -1)]:
            with pytest.raises(ValueError, match="outside"):
                memory.to_view(offset, length)
        with pytest.raises(ValueError, match="40 bytes at 0 of 40 local ones do not fit the 20"):
            one.write(memory.to_view(), remote)
        with pytest.raises(ValueError, match="not that of"):
            one.write(memory.to_view(), memory.to_remote_buffer())
        with pytest.raises(TypeError, match="GradwireMutableMemoryView"):
            one.read(memory.to_view(0, 4), remote)
        with pytest.raises(TypeError, match="this transport registered"):
            one.write(far.to_view(), remote)
        with pytest.raises(ValueError, match="timeout"):
            one.write(memory.to_view(0, 4), remote, timeout=-1)
        with pytest.raises(ValueError, match="contiguous"):
            one.register_memory(torch.zeros(4, 4).t())
        with pytest.raises(ValueError, match="malformed"):
            type(remote).deserialize(b"gwm1")
        assert one.write(memory.to_view(0, 0), remote) == 0
        assert one.write(memory.to_view(0, 20), remote) == 0
    with pytest.raises(RuntimeError, match="failed to create"):
        new_transport("gradwire", "cuda")
    with pytest.raises(ValueError, match="bind"), new_transport("gradwire") as lost:
        lost.connect(b"nowhere")


def test_verbs_that_are_asked_for_by_name_and_cannot_be_had_are_an_error() -> None:
    with new_transport("gradwire", transport="verbs", timeout=20) as transport:
        try:
            transport.bind()
        except ValueError as error:
            assert "GRADWIRE_TRANSPORT=verbs" in str(error)
        else:
            assert transport.describe()["device"], "this host has one"
