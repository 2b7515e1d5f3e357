"""How an algorithm is chosen and explained, and sums whose bits depend on nothing but what goes in."""

from __future__ import annotations

import os
import pathlib

import gradwire
import numpy
import pytest
from gradwire.config import Config
from ranks import run

WORLD = 3


def numbers(rank: int, length: int = 50_021) -> numpy.ndarray:
    return numpy.random.default_rng(rank).uniform(0.5, 1.5, length).astype(numpy.float32)


def in_rank_order() -> numpy.ndarray:
    total = numbers(0)
    for rank in range(1, WORLD):
        total = total + numbers(rank)
    return total


def sums(rank: int, size: int, url: str, wire: str, deterministic: bool) -> bytes:
    with gradwire.Communicator(
        url, rank=rank, world_size=size, transport=wire, deterministic=deterministic, timeout_s=60
    ) as group:
        whole, parts = numbers(rank), numbers(rank)
        group.all_reduce(whole)
        for part in (parts[:17], parts[17:40_000], parts[40_000:]):
            group.all_reduce(part)
        assert not deterministic or whole.tobytes() == parts.tobytes()
        return whole.tobytes()


@pytest.mark.parametrize("wire", ["tcp", "shm"])
def test_deterministic_sums_are_those_in_rank_order_whole_or_in_parts(wire: str) -> None:
    assert set(run(WORLD, sums, wire, True)) == {in_rank_order().tobytes()}


def explains(rank: int, size: int, url: str) -> tuple[str, ...]:
    with gradwire.Communicator(url, rank=rank, world_size=size, transport="tcp", timeout_s=60) as group:
        told = [group.explain("all_reduce", bytes) for bytes in (8, 1 << 20, 1 << 28)]
        for one in told:
            assert one.algorithm == one.expected_us[0][0] and "measured" in one.reason
            assert f"{one.algorithm}: it is expected to take the least" in str(one)
            assert [us for _, us in one.expected_us] == sorted(us for _, us in one.expected_us)
        assert "measured" in group.describe().collectives
        with pytest.raises(ValueError, match="float33"):
            group.explain("all_reduce", 8, dtype="float33")
    return tuple(str(one) for one in told)


def test_all_ranks_choose_alike_and_say_why() -> None:
    assert len(set(run(WORLD, explains))) == 1


def wished(rank: int, size: int, url: str) -> None:
    algorithms = "all_reduce:double_tree;all_to_all:bruck;all_gather:bruck"
    with gradwire.Communicator(
        url, rank=rank, world_size=size, transport="tcp", algorithms=algorithms, timeout_s=60
    ) as group:
        assert group.explain("all_reduce", 8).reason == "GRADWIRE_ALGO says so"
        tensor = numpy.full(1000, rank + 1, numpy.float32)
        group.all_reduce(tensor)
        assert (tensor == sum(range(1, size + 1))).all()
        given = numpy.array([rank * 10 + to for to in range(size)], numpy.int64)
        numpy.testing.assert_array_equal(group.all_to_all(given), [source * 10 + rank for source in range(size)])
        numpy.testing.assert_array_equal(group.all_gather(given[:1]).ravel(), [source * 10 for source in range(size)])


def test_wishes_are_followed_and_what_cannot_be_is_refused(tmp_path: pathlib.Path) -> None:
    run(WORLD, wished)
    for algorithms, deterministic in [("all_reduce:quick", False), ("all_reduce:ring", True)]:
        with pytest.raises(ValueError, match="all_reduce:direct"):
            gradwire.Communicator(
                f"file://{tmp_path}",
                rank=0,
                world_size=1,
                algorithms=algorithms,
                deterministic=deterministic,
                timeout_s=30,
            )


def test_the_environment_has_its_switch() -> None:
    for text, expected in [("1", True), ("true", True), ("0", False), ("", False)]:
        assert Config.from_environment({"GRADWIRE_DETERMINISTIC": text}).deterministic is expected
    with pytest.raises(ValueError, match="GRADWIRE_DETERMINISTIC"):
        Config.from_environment({"GRADWIRE_DETERMINISTIC": "perhaps"})


def torch_options(rank: int, size: int, url: str) -> list[bytes]:
    import torch
    import torch.distributed as dist
    from gradwire.torch import Options

    def candidates(group: dist.ProcessGroup) -> set[str]:
        return {name for name, _ in group._get_backend(torch.device("cpu")).explain("all_reduce", 1 << 22).expected_us}

    # On one segment sums are in rank order anyway.
    os.environ["GRADWIRE_TRANSPORT"] = "tcp"
    store = dist.FileStore(url.removeprefix("file://") + "/store", size)
    dist.init_process_group("gradwire", store=store, rank=rank, world_size=size, pg_options=Options(deterministic=True))
    given = torch.arange(size) + 10 * rank
    got = torch.empty_like(given)
    dist.all_to_all_single(got, given)
    assert got.tolist() == [source * 10 + rank for source in range(size)]
    os.environ["GRADWIRE_ALGO"] = "all_to_all:bruck"
    packing = dist.new_group()
    del os.environ["GRADWIRE_ALGO"]
    for one in range(size):
        splits = [1] * size if rank == one else None
        dist.all_to_all_single(got.zero_(), given, splits, splits, group=packing)
        assert got.tolist() == [source * 10 + rank for source in range(size)]
    # A ring adds up from another rank in each chunk.
    assert "ring" in candidates(dist.new_group())
    found = []
    for group in (dist.group.WORLD, dist.split_group(split_ranks=[list(range(size))])):
        assert "direct" in candidates(group) and "ring" not in candidates(group)
        dist.all_reduce(tensor := torch.from_numpy(numbers(rank)), group=group)
        found.append(tensor.numpy().tobytes())
    dist.destroy_process_group()
    return found


def test_a_process_group_can_be_deterministic_and_so_is_what_is_split_from_it() -> None:
    assert run(WORLD, torch_options) == [[in_rank_order().tobytes()] * 2] * WORLD
