"""Memory of CUDA devices, against a double of the driver; and what is said where there is no driver."""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import gradwire
import numpy
import pytest
import torch
import torch.distributed as dist
from cuda_double import LAUNCHES, LIVE_OPENED, Driver, Tensor, build
from gradwire.errors import CudaError
from ranks import run


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = build(tmp_path_factory.mktemp("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWIRE_CUDA_LIBRARY", path)
        yield path


def own(rank: int, length: int) -> numpy.ndarray:
    return (numpy.arange(length) % 97 + 1000 * rank).astype("float32")


def on_devices(rank: int, size: int, url: str, path: str) -> None:
    os.environ["GRADWIRE_CUDA_LIBRARY"] = path
    cuda = Driver(path, rank % 2)
    with gradwire.Communicator(url, rank=rank, world_size=size, transport="tcp") as group:
        for length in (0, 1, 1000, 1_200_000):
            total = sum(own(one, length) for one in range(size))
            tensor = cuda.array(own(rank, length))
            assert group.all_reduce(tensor) is tensor
            numpy.testing.assert_array_equal(cuda.numpy(tensor), total)
            later = group.all_reduce(tensor, op="avg", async_op=True)
            later.wait()
            numpy.testing.assert_array_equal(cuda.numpy(tensor), total)
            parts = cuda.array(numpy.zeros((size, length), "float32"))
            group.all_gather(cuda.array(own(rank, length)), parts)
            numpy.testing.assert_array_equal(cuda.numpy(parts), [own(one, length) for one in range(size)])
            part = cuda.array(numpy.zeros(length, "float32"))
            group.reduce_scatter(parts, part)
            numpy.testing.assert_array_equal(cuda.numpy(part), own(rank, length) * size)
            group.broadcast(part, root=1)
            numpy.testing.assert_array_equal(cuda.numpy(part), own(1, length) * size)
            coming = group.recv(tensor, (rank - 1) % size, async_op=True)
            group.send(part, (rank + 1) % size)
            assert coming.wait() == (rank - 1) % size
            numpy.testing.assert_array_equal(cuda.numpy(tensor), own(1, length) * size)
        told, long = group.describe().devices
        refusal = "rank 0: a rank is reached by tcp, which reads no device"
        assert long == f"calls of several rounds staged too, as devices do not reach each other ({refusal})"
        how = "staged by 4 pinned buffers of 4 MiB, copies and messages at once; "
        assert told.startswith(f"CUDA device {rank % 2} (Double {rank % 2}): {how}") and "MiB pinned" in told, told
        assert (group.all_reduce(numpy.ones(3)) == size).all()


def test_every_call_takes_memory_of_a_device(double: str) -> None:
    run(2, on_devices, double)


def lent(rank: int, size: int, url: str, path: str) -> None:
    """Processes of one host: each reaches the others' devices by handles, and kernels of the double fold there."""
    os.environ["GRADWIRE_CUDA_LIBRARY"] = os.environ["GRADWIRE_NVRTC_LIBRARY"] = path
    os.environ["GRADWIRE_CUDA_REDUCE"] = "device"
    cuda, length = Driver(path, rank % 2), 9_000_001
    with gradwire.Communicator(url, rank=rank, world_size=size) as group:
        for op, expected in (("sum", sum(own(one, length) for one in range(size))), ("max", own(size - 1, length))):
            tensor = cuda.array(own(rank, length))
            group.all_reduce(tensor, op=op)
            numpy.testing.assert_array_equal(cuda.numpy(tensor), expected)
        parts = cuda.array(numpy.zeros((size, length), "float32"))
        group.all_gather(cuda.array(own(rank, length)), parts)
        numpy.testing.assert_array_equal(cuda.numpy(parts), [own(one, length) for one in range(size)])
        part = cuda.array(numpy.zeros(length, "float32"))
        group.reduce_scatter(parts, part)
        numpy.testing.assert_array_equal(cuda.numpy(part), own(rank, length) * size)
        _, told, folded = group.describe().devices
        assert folded.endswith("(rank 0 was told to by GRADWIRE_CUDA_REDUCE=device)"), folded
        how = "from device to device by CUDA IPC, 32 MiB lent, folded there (NVRTC 99.1, sm_90)"
        assert told == f"calls of several rounds {how}", told


def test_ranks_of_one_host_lend_each_other_memory_of_their_devices(double: str) -> None:
    run(3, lent, double)
    counted = struct.unpack("512q", pathlib.Path(f"{double}.control").read_bytes())
    assert counted[LAUNCHES] >= 3 * 3 and counted[LIVE_OPENED] == 0


def folded(rank: int, size: int, url: str, path: str) -> None:
    """Told by the environment, told wrongly, and told nothing: by what all ranks have measured."""
    os.environ["GRADWIRE_CUDA_LIBRARY"] = os.environ["GRADWIRE_NVRTC_LIBRARY"] = path
    cuda, length = Driver(path), 2_000_003
    hosts = "CUDA tensors are folded on the hosts (rank 1: told not to by GRADWIRE_CUDA_REDUCE=host)"
    for number, (said, told) in enumerate([("host", hosts), (None, "CUDA tensors are folded on the "), ("auto", "expected: ")]):
        os.environ.pop("GRADWIRE_CUDA_REDUCE", None)
        if said and rank == 1:
            os.environ["GRADWIRE_CUDA_REDUCE"] = said
        with gradwire.Communicator(f"{url}/{number}", rank=rank, world_size=size, transport="tcp") as group:
            tensor = cuda.array(own(rank, length))
            group.all_reduce(tensor)
            numpy.testing.assert_array_equal(cuda.numpy(tensor), own(0, length) + own(1, length))
            reason = group.explain("all_reduce", 4 * length).reason
            assert told in reason, reason
    os.environ["GRADWIRE_CUDA_REDUCE"] = "moon"
    with pytest.raises(ValueError, match="GRADWIRE_CUDA_REDUCE: `moon` is no place to sum at: auto, device or host"):
        gradwire.Communicator(url, rank=rank, world_size=size)


def test_where_tensors_are_folded_is_told_or_measured(double: str) -> None:
    run(2, folded, double)


def ordered(rank: int, size: int, url: str, path: str) -> None:
    """The way of PyTorch's tensors: DLPack's exchange API, the current stream, results in its order and no wait of the host."""
    os.environ["GRADWIRE_CUDA_LIBRARY"] = path
    cuda = Driver(path)
    Tensor.stream = stream = cuda.stream()
    with gradwire.Communicator(url, rank=rank, world_size=size) as group:
        array = cuda.array(own(rank, 1_200_000), stream)
        work = group.all_reduce(Tensor(array, 0), async_op=True)
        assert work._operation.order(stream, 0)
        numpy.testing.assert_array_equal(cuda.numpy(array, stream), own(0, 1_200_000) + own(1, 1_200_000))
        work.wait()


def test_results_are_there_in_the_order_of_the_stream_that_dlpack_tells(double: str) -> None:
    run(2, ordered, double)


def test_what_cannot_be_sent_is_told_before_anything_is(double: str, tmp_path: pathlib.Path) -> None:
    cuda, host = Driver(double), numpy.ones((4, 6), "float32")
    with gradwire.Communicator(f"file://{tmp_path}", rank=0, world_size=1) as group:
        good = cuda.array(host)
        for refused, error, said in [
            (cuda.array(host, strides=(48, 8)), ValueError, "is not contiguous"),
            (cuda.array(host, data=(good.address, True)), ValueError, "is read-only"),
            (cuda.array(host, typestr="<V3"), ValueError, "cannot be sent"),
            (cuda.array(host, stream=0), ValueError, "stream 0 is ambiguous"),
            (cuda.array(host, data=(host.ctypes.data, False)), CudaError, "the driver does not know it"),
            (cuda.array(host, shape=(4, 100_000)), CudaError, "are not memory of CUDA device 0"),
            (Tensor(good, 1), CudaError, "it is of device 0"),
            (Tensor(good, 7), CudaError, "there is no CUDA device 7: the driver sees 2"),
        ]:
            with pytest.raises(error, match=said):
                group.all_reduce(refused)
        with pytest.raises(ValueError, match="all tensors of one call are on one CUDA device or all in host memory"):
            group.all_gather(good, numpy.empty((1, 4, 6), "float32"))
        group.all_reduce(good)


def backend(rank: int, size: int, url: str) -> Any:
    dist.init_process_group("gradwire", init_method=f"{url}/torch", rank=rank, world_size=size)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    group = dist.distributed_c10d._get_default_group()
    found = sorted(device.type for device in group._device_types)
    dist.destroy_process_group()
    return found, tensor.tolist()


def without_driver(rank: int, size: int, url: str, path: str) -> Any:
    os.environ["GRADWIRE_CUDA_LIBRARY"] = path + ".missing"
    cuda = Driver(path)
    with gradwire.Communicator(url, rank=rank, world_size=size) as group:
        with pytest.raises(CudaError, match=r"no CUDA driver: .*missing cannot be loaded .*install NVIDIA's driver") as told:
            group.all_reduce(cuda.array(numpy.ones(3)))
        assert (told.value.call, told.value.code) == ("", 0)
        assert (group.all_reduce(numpy.ones(3)) == size).all()
    return backend(rank, size, url)


def test_without_a_driver_the_error_says_so_and_groups_go_on_torchs_for_both_kinds_of_tensors_too(double: str) -> None:
    assert run(2, without_driver, double) == [(["cpu", "cuda"], [2, 2, 2])] * 2


def test_tables_of_the_parameter_server_take_memory_of_a_device(double: str) -> None:
    cuda = Driver(double)
    with gradwire.LocalCluster(2) as servers, servers.connect(rank=0) as client:
        table = client.dense("weights", (100_003,), "float32", workers=1)
        table.init(cuda.array(own(0, 100_003)))
        table.push(cuda.array(own(1, 100_003), cuda.stream()))
        out = cuda.array(numpy.zeros(100_003, "float32"))
        table.pull(out)
        numpy.testing.assert_array_equal(cuda.numpy(out), own(0, 100_003) + own(1, 100_003))
        table.push_pull(cuda.array(own(1, 100_003)), out)
        numpy.testing.assert_array_equal(cuda.numpy(out), own(0, 100_003) + 2 * own(1, 100_003))
