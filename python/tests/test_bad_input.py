"""What ranks are told of tensors that hold NaN, and of parts that are not as long as the other end awaits."""

from __future__ import annotations

import os
import socket
from typing import Any

import gradwire
import numpy
import pytest
import torch
import torch.distributed as dist
from ranks import run


def in_torch(rank: int, size: int, url: str, wire: str, **environment: str) -> None:
    os.environ |= {"GRADWIRE_TRANSPORT": wire, **environment}
    dist.init_process_group("gradwire", init_method=f"{url}/store", rank=rank, world_size=size)


def gives_nan(rank: int, size: int, url: str, wire: str) -> Any:
    in_torch(rank, size, url, wire, GRADWIRE_CHECK_NAN="1")
    gradients = torch.full((1000,), float("inf"), dtype=torch.bfloat16)
    dist.all_reduce(gradients)
    if rank == 1:
        gradients[17] = float("nan")
    with pytest.raises(gradwire.NotANumberError) as caught:
        dist.all_reduce(gradients)
    error = caught.value
    assert str(error).startswith(f"{error.operation}: rank 1 (host {error.host}, pid {error.pid}) gave NaN")
    return error.rank, error.element, error.host, error.pid, error.operation, os.getpid()


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_who_gives_nan_is_named_on_every_rank(wire: str) -> None:
    results = run(3, gives_nan, wire)
    for _, _, _, _, operation, _ in results:
        assert operation.startswith("all_reduce sum of 1000 bfloat16 (number ")
    told = {result[:4] for result in results}
    assert told == {(1, 17, socket.gethostname(), results[1][-1])}


def looks_for_nan(rank: int, size: int, url: str) -> None:
    group = gradwire.Communicator(url, rank=rank, world_size=size, check_nan=True)
    for dtype in ("int32", "float32"):
        group.all_reduce(numpy.full(10, 0x7FC00000).astype(dtype))
    with pytest.raises(gradwire.NotANumberError, match="element 3 of what it gave"):
        group.all_gather(numpy.array([0, 1, 2, numpy.nan if rank == 0 else 3]))


def test_what_is_no_float_has_no_nan() -> None:
    run(2, looks_for_nan)


def splits_wrongly(rank: int, size: int, url: str, wire: str) -> Any:
    in_torch(rank, size, url, wire)
    # Each keeps three, and gives the other four where that one awaits three.
    give, output = torch.arange(7.0), torch.empty(6)
    kept = [3, 4] if rank == 0 else [4, 3]
    with pytest.raises(gradwire.CollectiveMismatchError) as caught:
        dist.all_to_all_single(output, give, [3, 3], kept)
        dist.barrier()
    error = caught.value
    assert f"rank {error.rank} (host {error.host}, pid {error.pid}) gives 4 elements" in str(error)
    return error.rank, error.got, error.expected, str(error)


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_splits_that_do_not_fit_name_both_ends(wire: str) -> None:
    for blamed, got, expected, text in run(2, splits_wrongly, wire):
        # Two pairs are wrong: rank 0 gives 4 where 3 are awaited, and so does rank 1.
        assert (blamed, got, expected) in {
            (sender, f"4 elements for rank {1 - sender}", f"3 elements for rank {1 - sender}") for sender in (0, 1)
        }, text
        assert "input splits of the one and output splits of the other" in text
