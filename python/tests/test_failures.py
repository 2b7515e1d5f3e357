"""What survivors are told when a rank dies, differs or does not come, and what is refused before anything is sent."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import gradwire
import numpy
import pytest
from ranks import Ranks, run


def until_it_fails(rank: int, size: int, url: str, wire: str, gate: str) -> Any:
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    tensor = numpy.ones(200_000, "float32")
    group.all_reduce(tensor)
    with open(f"{gate}.{rank}", "w") as file:
        file.write(str(os.getpid()))
    try:
        while True:
            group.all_reduce(tensor, "max")
    except gradwire.RankFailedError as error:
        return time.time(), error.ranks, error.hosts, error.pids, str(error), error.operation


def wait_until_at_work(gate: str, size: int) -> None:
    deadline = time.monotonic() + 60
    while not all(os.path.exists(f"{gate}.{rank}") for rank in range(size)):
        assert time.monotonic() < deadline, "the ranks did not meet"
        time.sleep(0.01)


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_a_killed_rank_is_named_by_all_survivors_in_under_0_3_seconds(wire: str, tmp_path: Any) -> None:
    gate = str(tmp_path / "at-work")
    ranks = Ranks(4, until_it_fails, wire, gate)
    wait_until_at_work(gate, 4)
    killed = ranks.kill(2)
    pid = ranks.processes[2].pid
    for result in filter(None, ranks.results(but=2)):
        when, blamed, hosts, pids, text, operation = result
        assert (blamed, pids, len(hosts)) == ([2], [pid], 1), text
        assert "all_reduce" in operation and "rank 2" in text and f"pid {pid}" in text
        assert when - killed < 0.3, f"{when - killed:.3f} s: {text}"


def until_it_is_late(rank: int, size: int, url: str, wire: str, gate: str, front: str) -> Any:
    """Sums in a group of `gradwire` or of torch until a call fails: what it failed with, when, and the calls that ended well."""
    if front == "torch":
        os.environ.update(GRADWIRE_TRANSPORT=wire, GRADWIRE_TIMEOUT="2")
        sums = sums_of_torch(rank, size, url)
    else:
        group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
        tensor = numpy.ones(200_000, "float32")
        group.barrier()

        def sums() -> None:
            group.all_reduce(tensor, "max", timeout_s=2)

    ended = 0
    try:
        while True:
            sums()
            ended += 1
            if ended == 5:
                with open(f"{gate}.{rank}", "w"):
                    pass
    except gradwire.CollectiveTimeoutError as error:
        assert f"rank {error.missing[0]} (host {error.hosts[0]}, pid {error.pids[0]}) did not come" in str(error)
        return time.time(), error.missing, error.waited_s, error.operation, str(error), ended


def sums_of_torch(rank: int, size: int, url: str) -> Callable[[], None]:
    import torch
    import torch.distributed as dist

    store = dist.FileStore(url.removeprefix("file://") + "/store", size)
    # GRADWIRE_TIMEOUT is for the meeting, too, so all begin it together.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{one}" for one in range(size)], timedelta(minutes=1))
    dist.init_process_group("gradwire", store=store, rank=rank, world_size=size)
    dist.barrier()
    tensor = torch.ones(200_000)
    return lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX)


@pytest.mark.parametrize("front", ["gradwire", "torch"])
@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_a_stopped_rank_is_named_by_all_survivors_at_the_deadline(wire: str, front: str, tmp_path: Any) -> None:
    gate = str(tmp_path / "at-work")
    ranks = Ranks(3, until_it_is_late, wire, gate, front)
    wait_until_at_work(gate, 3)
    stopped = ranks.stop(2)
    survivors = ranks.results(but=2)[:2]
    for when, missing, waited_s, operation, text, ended in survivors:
        assert (missing, waited_s) == ([2], 2), text
        assert f"rank 2 (host {socket.gethostname()}, pid {ranks.processes[2].pid}) did not come" in text
        # The barrier was number 0.
        call = re.fullmatch(r"all_reduce max of 200000 float32 \(number (\d+) of group \w+\)", operation)
        assert call and int(call[1]) == ended + 1 >= 6, f"{operation} after {ended} calls"
        assert text.startswith(f"{operation}: ")
        assert 1.5 < when - stopped < 10, f"{when - stopped:.3f} s: {text}"
    assert len({operation for _, _, _, operation, _, _ in survivors}) == 1, survivors


def differ(rank: int, size: int, url: str, wire: str, kind: str) -> Any:
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    tensor = numpy.ones(1000, "float32")
    group.all_reduce(tensor)
    odd = rank == 1
    with pytest.raises(gradwire.CollectiveMismatchError) as caught:
        if kind == "operation" and odd:
            group.broadcast(tensor)
        elif kind == "dtype" and odd:
            group.all_reduce(numpy.ones(1000, "int32"))
        elif kind == "count" and odd:
            group.all_reduce(numpy.ones(1001, "float32"))
        elif kind == "op" and odd:
            group.all_reduce(tensor, "max")
        elif kind == "root":
            group.broadcast(tensor, root=2 if odd else 0)
            # Over TCP a root that nobody keeps waiting hears of it in its next call.
            group.barrier()
        else:
            group.all_reduce(tensor)
    error = caught.value
    assert f"rank {error.rank} (host {error.host}, pid {error.pid}) called" in str(error)
    return (error.rank, error.expected, error.got), error.operation, str(error), os.getpid()


@pytest.mark.parametrize("wire", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["operation", "dtype", "count", "op", "root"])
def test_ranks_that_call_different_things_all_hear_who_differs(wire: str, kind: str) -> None:
    results = run(3, differ, wire, kind)
    expected = "broadcast of 1000 float32 with root 0" if kind == "root" else "all_reduce sum of 1000 float32"
    got = {
        "operation": "broadcast of 1000 float32 with root 0",
        "dtype": "all_reduce sum of 1000 int32",
        "count": "all_reduce sum of 1001 float32",
        "op": "all_reduce max of 1000 float32",
        "root": "broadcast of 1000 float32 with root 2",
    }[kind]
    for rank, (blamed, operation, text, _) in enumerate(results):
        assert blamed == (1, expected, got), text
        if (kind, wire, rank) == ("root", "tcp", 0) and operation.startswith("barrier"):
            assert operation == "barrier (number 2 of group world)"
        else:
            assert operation == f"{got if rank == 1 else expected} (number 1 of group world)"
        assert f"rank 1 (host {socket.gethostname()}, pid {results[1][-1]}) called {got} where the others called" in text


def late(rank: int, size: int, url: str, wire: str) -> Any:
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    group.barrier()
    if rank == 1:
        # Alive, but it does not come: it waits for a message that rank 0 sends once it has had its error.
        with pytest.raises(gradwire.GradwireError):
            group.recv(numpy.zeros(1), 0, timeout_s=30)
        return os.getpid()
    began = time.monotonic()
    with pytest.raises(gradwire.CollectiveTimeoutError) as caught:
        group.all_reduce(numpy.ones(10), timeout_s=0.5)
    error = caught.value
    return error.missing, error.waited_s, error.operation, str(error), time.monotonic() - began


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(wire: str) -> None:
    results = run(3, late, wire)
    for missing, waited_s, operation, text, elapsed in (results[0], results[2]):
        assert (missing, waited_s, operation) == ([1], 0.5, "all_reduce sum of 10 float64 (number 1 of group world)")
        assert f"rank 1 (host {socket.gethostname()}, pid {results[1]}) did not come" in text
        assert elapsed < 5


def alone(rank: int, size: int, url: str) -> None:
    with pytest.raises(gradwire.RendezvousTimeoutError, match="rank 1") as caught:
        gradwire.Communicator(url, rank=0, world_size=2, timeout_s=0.5)
    assert 0.3 < caught.value.waited_s < 10


def test_a_rank_that_never_starts_is_named() -> None:
    run(1, alone)


def tokens(rank: int, size: int, url: str) -> str:
    with pytest.raises(gradwire.GradwireError) as caught:
        gradwire.Communicator(url, rank=rank, world_size=size, token=f"secret {rank}", timeout_s=3)
    return type(caught.value).__name__


def test_another_token_is_refused() -> None:
    assert "AuthenticationError" in run(2, tokens)


def aborts(rank: int, size: int, url: str) -> None:
    group = gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60)
    group.barrier()
    if rank == 0:
        group.abort("the loss is NaN")
    with pytest.raises(gradwire.GroupAbortedError, match="the loss is NaN") as caught:
        while True:
            group.all_reduce(numpy.ones(10))
    assert "rank 0" in caught.value.reason


def test_abort_releases_every_rank_with_the_reason() -> None:
    run(3, aborts)


def interrupted(rank: int, size: int, url: str, wire: str, background: bool) -> str:
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    group.barrier()
    began = time.monotonic()
    if rank == 0:
        # Whoever starts the tests in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            work = group.all_reduce(numpy.ones(10), async_op=background)
            work.wait()
        group.close()
    else:
        with pytest.raises(gradwire.GradwireError):
            group.recv(numpy.zeros(1), 0)
    assert time.monotonic() - began < 10
    return "ended"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_ctrl_c_ends_a_wait_and_the_others_hear_of_it(wire: str, background: bool) -> None:
    assert run(2, interrupted, wire, background) == ["ended"] * 2


def sends_beside(rank: int, size: int, url: str, wire: str) -> None:
    group = gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60)
    if rank == 0:
        # Another thread sends while this one waits, and the wait ends only because of that.
        threading.Timer(0.1, lambda: group.send(numpy.ones(1), 1)).start()
        group.barrier()
    else:
        group.recv(numpy.zeros(1), 0)
        group.barrier()
    group.close()


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_other_threads_send_while_one_waits_for_ranks(wire: str) -> None:
    run(2, sends_beside, wire)


def refuses(rank: int, size: int, url: str) -> None:
    with gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60) as group:
        read_only = numpy.ones(4)
        read_only.flags.writeable = False
        table: list[tuple[type[Exception], str, Any]] = [
            (ValueError, r"tensor: .*\[3, 4\].*float64 is not contiguous", lambda: group.all_reduce(numpy.ones((4, 3)).T)),
            (ValueError, "read-only", lambda: group.all_reduce(read_only)),
            (ValueError, "read-only", lambda: group.broadcast(b"abcd")),
            (TypeError, "str has no memory", lambda: group.all_reduce("abc")),
            (TypeError, "NoneType has no memory", lambda: group.broadcast(None)),
            (TypeError, "cannot be sent", lambda: group.broadcast(numpy.array(["a", "b"]))),
            (TypeError, "cannot be sent", lambda: group.broadcast(numpy.zeros(2, [("a", "i4"), ("b", "f4")]))),
            (TypeError, "cannot be sent", lambda: group.broadcast(numpy.zeros(2, ">f4"))),
            (ValueError, "median", lambda: group.all_reduce(numpy.ones(4), "median")),
            (ValueError, "bit-and of float64", lambda: group.all_reduce(numpy.ones(4), "band")),
            (ValueError, "2 ranks", lambda: group.broadcast(numpy.ones(4), root=2)),
            (ValueError, "cannot be cut into 2", lambda: group.reduce_scatter(numpy.ones(3))),
            (ValueError, "cannot be cut into 2", lambda: group.all_to_all(numpy.ones(3))),
            (ValueError, "one output for each of the 2", lambda: group.all_gather(numpy.ones(3), [numpy.ones(3)] * 3)),
            (ValueError, "3 elements", lambda: group.all_gather(numpy.ones(3), numpy.ones(8))),
            (TypeError, "same dtype", lambda: group.all_gather(numpy.ones(2), numpy.ones(4, "float32"))),
            (ValueError, "another rank", lambda: group.send(numpy.ones(1), rank)),
            (ValueError, "another rank", lambda: group.recv(numpy.ones(1), 2)),
            (OverflowError, "", lambda: group.send(numpy.ones(1), -1)),
            (ValueError, "timeout_s", lambda: group.all_reduce(numpy.ones(1), timeout_s=-1.0)),
            (ValueError, "timeout_s", lambda: group.all_reduce(numpy.ones(1), timeout_s=float("nan"))),
        ]
        for kind, words, call in table:
            with pytest.raises(kind, match=words):
                call()
        tensor = numpy.ones(4)
        assert group.all_reduce(tensor)[0] == 2, "the group goes on"


def test_what_makes_no_sense_is_refused_and_the_group_goes_on() -> None:
    run(2, refuses)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("not known", {"init_method": "http://localhost", "rank": 0, "world_size": 1}),
        ("is not a URL", {"init_method": "nowhere", "rank": 0, "world_size": 1}),
        ("not one of a group", {"init_method": "file:///tmp", "rank": 3, "world_size": 2}),
        ("rank", {"init_method": "file:///tmp"}),
        ("carrier-pigeon", {"init_method": "file:///tmp", "rank": 0, "world_size": 1, "transport": "carrier-pigeon"}),
        ("lanes", {"init_method": "file:///tmp", "rank": 0, "world_size": 1, "lanes": 0}),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(words: str, arguments: dict[str, Any], monkeypatch: Any) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=words):
        gradwire.Communicator(**arguments)
