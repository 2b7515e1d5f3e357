"""How long an operation may take: what the caller says, else GRADWIRE_TIMEOUT, else each front's own default."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import gradwire
import numpy
import pytest
import torch
import torch.distributed as dist
from gradwire.config import Config
from gradwire.torch import Options
from ranks import run
from torch.distributed.constants import default_pg_timeout

CPU = torch.device("cpu")


def group_of_one(**given: Any) -> Any:
    """The backend of a group of this process alone; the caller destroys it."""
    dist.init_process_group("gradwire", store=dist.HashStore(), rank=0, world_size=1, **given)
    return dist.group.WORLD._get_backend(CPU)


def seconds(minutes: float = 0, **given: float) -> timedelta:
    return timedelta(minutes=minutes, **given)


#: GRADWIRE_TIMEOUT, `timeout=` of `init_process_group`, that of `Options` (absent: no options), and the seconds that hold.
GROUPS: list[tuple[str | None, timedelta | None, dict[str, timedelta | None] | None, float]] = [
    (None, None, None, default_pg_timeout.total_seconds()),
    (None, seconds(seconds=7), None, 7),
    (None, None, {"timeout": None}, 300),
    (None, seconds(seconds=7), {"timeout": None}, 7),
    (None, seconds(seconds=7), {"timeout": seconds(seconds=8)}, 8),
    ("12.5", None, None, 12.5),
    ("12.5", default_pg_timeout, None, 12.5),
    ("12.5", seconds(seconds=7), None, 7),
    ("12.5", None, {"timeout": None}, 12.5),
    ("12.5", seconds(seconds=7), {"timeout": None}, 7),
    ("12.5", None, {"timeout": default_pg_timeout}, default_pg_timeout.total_seconds()),
]


def each_group(rank: int, size: int, url: str) -> list[float]:
    held = []
    for variable, timeout, options, _ in GROUPS:
        os.environ.pop("GRADWIRE_TIMEOUT", None)
        if variable is not None:
            os.environ["GRADWIRE_TIMEOUT"] = variable
        held.append(group_of_one(timeout=timeout, pg_options=None if options is None else Options(**options))._timeout)
        dist.destroy_process_group()
    return held


def test_a_groups_timeout_is_the_callers_then_the_variables_then_torchs() -> None:
    (held,) = run(1, each_group)
    assert held == [case[-1] for case in GROUPS]


def parts(rank: int, size: int, url: str) -> list[float]:
    os.environ["GRADWIRE_TIMEOUT"] = "12.5"
    group_of_one(timeout=seconds(seconds=7))
    groups = [
        dist.new_group([0]),
        dist.new_group([0], timeout=seconds(seconds=8)),
        dist.split_group(split_ranks=[[0]]),
        dist.split_group(split_ranks=[[0]], timeout=seconds(seconds=9)),
    ]
    held = [group._get_backend(CPU)._timeout for group in groups]
    dist.destroy_process_group()
    return held


def test_groups_within_a_group_take_the_variable_too() -> None:
    assert run(1, parts) == [[12.5, 8, 12.5, 9]]


def waits_in_torch(rank: int, size: int, url: str, call: str) -> Any:
    os.environ["GRADWIRE_TIMEOUT"] = "1.5"
    store = dist.FileStore(url.removeprefix("file://") + "/store", size)
    # Whoever starts has 1.5 s for the others, too: the variable is for the meeting as well.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{one}" for one in range(size)], seconds(1))
    dist.init_process_group("gradwire", store=store, rank=rank, world_size=size)
    if rank == 1:
        store.wait(["heard"], seconds(1))
        return None
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        dist.monitored_barrier() if call == "monitored_barrier" else dist.all_reduce(torch.ones(3))
    elapsed = time.monotonic() - began
    store.set("heard", "")
    return getattr(caught.value, "waited_s", None), str(caught.value), elapsed


@pytest.mark.parametrize("call", ["all_reduce", "monitored_barrier"])
def test_the_variable_ends_a_call_of_torch_that_a_rank_does_not_come_to(call: str) -> None:
    waited_s, text, elapsed = run(2, waits_in_torch, call)[0]
    assert 1.4 < elapsed < 10, text
    if call == "all_reduce":
        assert waited_s == 1.5 and "all_reduce sum of 3 float32" in text and "rank 1" in text
    else:
        assert text == "Rank 1 failed to pass monitoredBarrier in 1500 ms"


@pytest.mark.parametrize("given", [{}, {"timeout_s": 0.3}])
def test_a_client_of_a_parameter_server_waits_as_long_as_is_said(given: dict[str, float], monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADWIRE_TIMEOUT", "0.6")
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0, **given) as client:
        began = time.monotonic()
        with pytest.raises((gradwire.ServerTimeoutError, gradwire.ServerRefusedError)) as caught:
            client.barrier("of two", 2)
        elapsed = time.monotonic() - began
    expected = given.get("timeout_s", 0.6)
    assert expected * 0.9 < elapsed < expected + 5, caught.value


def test_a_client_that_says_nothing_has_300_seconds(monkeypatch: Any) -> None:
    monkeypatch.delenv("GRADWIRE_TIMEOUT", raising=False)
    asked: list[float] = []

    class Native:
        @staticmethod
        def connect(addresses: Any, token: Any, rank: Any, timeout_s: float, *others: Any) -> None:
            asked.append(timeout_s)

    monkeypatch.setattr(gradwire.ps._native, "PsClient", Native)
    gradwire.connect(["127.0.0.1:1"])
    gradwire.connect(["127.0.0.1:1"], timeout_s=2)
    monkeypatch.setenv("GRADWIRE_TIMEOUT", "41")
    gradwire.connect(["127.0.0.1:1"])
    gradwire.connect(["127.0.0.1:1"], timeout_s=2)
    assert asked == [300, 2, 41, 2]


@pytest.mark.parametrize("text", ["abc", "", "-1", "0", "nan", "inf", "1e19"])
def test_a_variable_that_is_no_time_is_refused_by_its_name(text: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADWIRE_TIMEOUT", text)
    words = f"GRADWIRE_TIMEOUT: `{text}` is not .*seconds after which an operation fails"
    for call in (
        Config.from_environment,
        lambda: gradwire.Communicator("file:///nowhere", rank=0, world_size=1),
        lambda: gradwire.connect(["127.0.0.1:1"]),
        group_of_one,
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not dist.is_initialized()
    numpy.testing.assert_equal(Config.from_environment({"GRADWIRE_TIMEOUT": "1e9"}).timeout_s, 1e9)
