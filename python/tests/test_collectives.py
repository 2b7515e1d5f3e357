"""Every collective against NumPy, over both wires, in worlds of 1 to 4 real processes."""

from __future__ import annotations

import gradwire
import numpy
import pytest
from ranks import run

DTYPES = ["float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
OPS = ["sum", "min", "max", "product", "avg", "band", "bor", "bxor"]
FOLD = {
    "sum": numpy.add,
    "min": numpy.minimum,
    "max": numpy.maximum,
    "product": numpy.multiply,
    "avg": numpy.add,
    "band": numpy.bitwise_and,
    "bor": numpy.bitwise_or,
    "bxor": numpy.bitwise_xor,
}
LENGTHS = [0, 1, 3, 1000, 100_003]


def own(rank: int, length: int, dtype: str) -> numpy.ndarray:
    """Numbers that tell rank and place, small enough that every sum is exact."""
    return ((numpy.arange(length) * 7 + rank * 3) % 5 + 1).astype(dtype)


def folded(size: int, length: int, dtype: str, op: str) -> numpy.ndarray:
    total = own(0, length, dtype)
    for rank in range(1, size):
        total = FOLD[op](total, own(rank, length, dtype))
    if op == "avg":
        exact = dtype.startswith(("int", "uint"))
        total = (total // size if exact else total / size).astype(dtype)
    return total


def same(got: numpy.ndarray, expected: numpy.ndarray, what: str) -> None:
    if got.dtype.kind == "f":
        numpy.testing.assert_allclose(got, expected, rtol=2e-3 if got.dtype.itemsize == 2 else 1e-6, err_msg=what)
    else:
        numpy.testing.assert_array_equal(got, expected, err_msg=what)


def reduces(rank: int, size: int, url: str, wire: str) -> list[bytes]:
    seen = []
    with gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60) as group:
        for dtype in DTYPES:
            for op in OPS:
                if dtype.startswith("float") and op.startswith("b"):
                    continue
                for length in LENGTHS:
                    what = f"{op} of {length} {dtype}"
                    expected = folded(size, length, dtype, op)
                    tensor = own(rank, length, dtype)
                    assert group.all_reduce(tensor, op) is tensor
                    same(tensor, expected, f"all_reduce {what}")
                    seen.append(tensor.tobytes())
                    tensor = own(rank, length, dtype)
                    group.reduce(tensor, size - 1, op)
                    same(tensor, expected if rank == size - 1 else own(rank, length, dtype), f"reduce {what}")
                    if length % size == 0:
                        part = group.reduce_scatter(own(rank, length, dtype), op=op)
                        same(part, numpy.split(expected, size)[rank], f"reduce_scatter {what}")
    return seen


def moves(rank: int, size: int, url: str, wire: str) -> None:
    with gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60) as group:
        for dtype in [*DTYPES, "bool", "complex64", "complex128"]:
            for length in LENGTHS:
                mine, all_parts = own(rank, length, dtype), [own(r, length, dtype) for r in range(size)]
                tensor = mine.copy()
                group.broadcast(tensor, root=size - 1)
                same(tensor, all_parts[-1], "broadcast")
                same(group.all_gather(mine), numpy.stack(all_parts), "all_gather")
                gathered = group.gather(mine, root=0)
                if rank == 0:
                    same(gathered, numpy.stack(all_parts), "gather")
                else:
                    assert gathered is None
                out = numpy.zeros(length, dtype)
                group.scatter(numpy.stack(all_parts) if rank == 0 else None, out)
                same(out, mine, "scatter")
                same(group.all_to_all(numpy.stack([mine + r for r in range(size)]).astype(dtype)),
                     numpy.stack([part + rank for part in all_parts]).astype(dtype), "all_to_all")
        # Views of one another: what a rank gives lies in what it gets, or the other way round.
        for length in LENGTHS:
            whole = numpy.zeros((size, length), "float32")
            whole[rank] = own(rank, length, "float32")
            group.all_gather(whole[rank], whole)
            same(whole, numpy.stack([own(r, length, "float32") for r in range(size)]), "all_gather in place")
            group.reduce_scatter(whole, whole[rank])
            same(whole[rank], size * own(rank, length, "float32"), "reduce_scatter in place")
        # Parts of different lengths, one of them empty.
        outs = [numpy.zeros(r * 5, "float32") for r in range(size)]
        group.all_gather(own(rank, rank * 5, "float32"), outs)
        for other, out in enumerate(outs):
            same(out, own(other, other * 5, "float32"), "uneven all_gather")
        outs = [numpy.zeros(r + rank, "int32") for r in range(size)]
        group.all_to_all([numpy.full(r + rank, rank * 10 + r, "int32") for r in range(size)], outs)
        for other, out in enumerate(outs):
            same(out, numpy.full(other + rank, other * 10 + rank, "int32"), "uneven all_to_all")
        group.barrier()


def messages(rank: int, size: int, url: str, wire: str) -> None:
    with gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60) as group:
        right, left = (rank + 1) % size, (rank - 1) % size
        for length in LENGTHS:
            inbox = numpy.zeros(length)
            waiting = group.recv(inbox, left, tag=7, async_op=True)
            group.send(own(rank, length, "float64"), right, tag=7)
            assert waiting.wait() == left and waiting.is_completed()
            same(inbox, own(left, length, "float64"), "send and recv")
        if rank == 0:
            seen = set()
            for _ in range(size - 1):
                inbox = numpy.zeros(1)
                source = group.recv(inbox)
                assert inbox[0] == source
                seen.add(source)
            assert seen == set(range(1, size))
        else:
            group.send(numpy.array([float(rank)]), 0)
        # A message of another length is an error of that receive, not of the group.
        if rank == 1:
            group.send(numpy.zeros(3), 0, tag=9)
        elif rank == 0:
            with pytest.raises(gradwire.MessageLengthError, match="24 bytes") as caught:
                group.recv(numpy.zeros(2), 1, tag=9)
            assert (caught.value.source, caught.value.tag) == (1, 9)
            assert (caught.value.expected_bytes, caught.value.got_bytes) == (16, 24)
        group.barrier()


def works(rank: int, size: int, url: str, wire: str) -> None:
    with gradwire.Communicator(url, rank=rank, world_size=size, transport=wire, timeout_s=60) as group:
        tensors = [numpy.full(5000, rank + step, "float32") for step in range(20)]
        handles = [group.all_reduce(tensor, async_op=True) for tensor in tensors]
        for step, handle in reversed(list(enumerate(handles))):
            same(handle.wait(), numpy.full(5000, sum(range(size)) + size * step, "float32"), "asynchronous")
            assert handle.is_completed()
        data = bytearray([rank + 1] * 8)
        group.all_reduce(data)
        assert data == bytearray([sum(range(1, size + 1))] * 8), "a bytearray counts as uint8"
        description = group.describe()
        assert (description.rank, description.world_size) == (rank, size)
        assert [link.rank for link in description.links] == [r for r in range(size) if r != rank]
        assert all(link.wire == wire and link.reason and link.pid for link in description.links)
        assert f"rank {rank} of {size}" in str(description)


CASES = [(1, "auto"), (2, "shm"), (2, "tcp"), (3, "shm"), (3, "tcp"), (4, "shm"), (4, "tcp")]


@pytest.mark.parametrize(("size", "wire"), CASES)
def test_reductions_agree_with_numpy_and_are_the_same_bits_on_every_rank(size: int, wire: str) -> None:
    results = run(size, reduces, wire)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(("size", "wire"), CASES)
def test_what_is_moved_arrives_in_its_place(size: int, wire: str) -> None:
    run(size, moves, wire)


@pytest.mark.parametrize(("size", "wire"), CASES[1:])
def test_messages_meet_their_receives(size: int, wire: str) -> None:
    run(size, messages, wire)


@pytest.mark.parametrize(("size", "wire"), CASES[1:])
def test_asynchronous_calls_end_in_any_order_of_waiting(size: int, wire: str) -> None:
    run(size, works, wire)
