"""RDMA between two guests with kernels of their own: one rank in each, a server in the first. Run by scripts/softroce-test.

The same tests run in both guests at once, so they are in step: each meets the other at an address of its own number.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import gradwire
import numpy as np
import pytest
from guests import exchange, link, serve, train, truth, wires

RANK = int(os.environ["SOFTROCE_RANK"])
FIRST = os.environ["SOFTROCE_HOSTS"].split(",")[0]
#: What the network does to packets, for tests that need it to do nothing, or something.
LOSSY = bool(os.environ.get("SOFTROCE_LOSSY"))


def _group(number: int, timeout_s: float = 60.0) -> gradwire.Communicator:
    return gradwire.Communicator(f"tcp://{FIRST}:{29500 + number}", rank=RANK, world_size=2, timeout_s=timeout_s)


def _counted(*names: str) -> int:
    """What the device's counters of these names say together."""
    counters = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters")
    return sum(int((counters / name).read_text()) for name in names)


def test_collectives_go_by_queue_pairs_with_the_reason_told() -> None:
    with _group(1) as group:
        exchange(group)
        assert wires(group) == ["verbs"]
        told = str(group.describe())
        assert "RoCE v2" in told and f"10.77.0.{RANK + 1}" in told, told
        assert _counted("send_rnr_err", "rcvd_rnr_err") == 0, "a message came before its receive"
        if LOSSY:
            sums = np.array([_counted("duplicate_request", "rcvd_seq_err", "out_of_seq_request")], np.int64)
            group.all_reduce(sums)
            assert sums[0] > 0, "packets were lost, or this tests nothing"


def test_training_with_a_server_in_one_guest_ends_where_one_process_does() -> None:
    addresses = [f"{FIRST}:7071"]
    os.environ["GRADWIRE_TOKEN"] = "between guests"
    with _group(2) as group:
        if RANK == 0:
            with serve(1, addresses[0]):
                group.barrier()
                end = train(0, 2, "", addresses)
                group.barrier()
        else:
            group.barrier()
            end = train(1, 2, "", addresses)
            group.barrier()
        np.testing.assert_allclose(end, truth(2), rtol=1e-5)
        both = np.zeros((2, end.size), np.float32)
        group.all_gather(end, both)
        assert both[0].tobytes() == both[1].tobytes()


def test_a_device_that_fails_gives_way_to_sockets_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # Queue pairs by one network, sockets by another.
    monkeypatch.setenv("GRADWIRE_IB_HCA", "=rxe1")
    with _group(3) as group:
        assert wires(group) == ["verbs"]
        for turn in range(30):
            if turn == 5 and RANK == 1:
                link("eth1", "down")
            buffer = np.full(40_000, RANK + turn, np.int64)
            group.all_reduce(buffer)
            assert (buffer == 1 + 2 * turn).all(), f"turn {turn}"
        assert wires(group) == ["tcp"]
        told = str(group.describe())
        assert "no RDMA any more" in told and "failed 3 times" in told, told
    link("eth1", "up")


def test_a_host_that_vanishes_is_named_in_bounded_time() -> None:
    group = _group(4, timeout_s=120.0)
    buffer = np.ones(100_000, np.float32)
    group.all_reduce(buffer)
    if RANK == 1:
        link("eth0", "down")
        time.sleep(20.0)  # Nothing is said, and no connection is closed.
        link("eth0", "up")
        group.abort("it has seen nothing")
        return
    began = time.monotonic()
    with pytest.raises(gradwire.RankFailedError) as raised:
        for _ in range(100):
            group.all_reduce(buffer, op="max")
    assert time.monotonic() - began < 18.0
    assert list(raised.value.ranks) == [1]
