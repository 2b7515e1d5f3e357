"""RDMA in one guest: several ranks and servers on one soft-RoCE device. Run by scripts/softroce-test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gradwire
import numpy as np
import pytest
from guests import exchange_everything, forked, link, serve, train, truth

sys.path.append(str(Path(__file__).parents[1]))
from cuda_double import Driver, build  # noqa: E402  (the folder above is no package)

DEVICE = "rdma0"


@pytest.fixture(autouse=True)
def _verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_TRANSPORT", "verbs")


@pytest.fixture
def _network() -> Iterator[None]:
    """Whatever a test does to the device's network, it is up again after it."""
    yield
    link(DEVICE, "up")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_of_every_kind_go_by_queue_pairs(size: int) -> None:
    for told in forked(size, exchange_everything):
        assert told == ["verbs"] * (size - 1)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_training_with_servers_ends_where_one_process_does(workers: int) -> None:
    with serve(shards=2) as addresses:
        ends = forked(workers, train, addresses)
    for end in ends:
        np.testing.assert_allclose(end, truth(workers), rtol=1e-5)
        assert end.tobytes() == ends[0].tobytes(), "every worker holds the same bits"


def _until_killed(rank: int, size: int, url: str) -> tuple[list[int], str, float]:
    with gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=30.0) as group:
        buffer = np.ones(200_000, np.float32)
        group.barrier()
        try:
            while True:
                group.all_reduce(buffer, op="max")
        except gradwire.RankFailedError as error:
            return list(error.ranks), str(error), time.time()


def test_a_killed_rank_is_named_by_all_others() -> None:
    ranks = forked.start(3, _until_killed)
    time.sleep(3.0)  # Somewhere in the middle: any moment will do.
    killed = ranks.kill(1)
    for named, text, when in (told for told in ranks.results(but=1) if told):
        assert named == [1] and "pid" in text
        # Emulated, and on a shared machine: seconds, where a real one takes a fraction.
        assert when - killed < 10.0


def test_a_killed_server_is_named_with_its_shard() -> None:
    with serve(shards=1) as addresses:
        client = gradwire.connect(addresses, rank=0, timeout_s=20.0, reconnect_s=0.5)
        table = client.dense("t", 1000, rule=gradwire.SGD(lr=0.1), workers=1)
        table.push(np.ones(1000, np.float32))
        serve.kill()
        with pytest.raises(gradwire.ServerLostError) as raised:
            table.pull()
        assert raised.value.shard == 0


def _insists(rank: int, size: int, url: str, folder: str) -> str:
    with gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=40.0) as group:
        Path(folder, f"ready{rank}").touch()
        try:
            for _ in range(10_000):
                group.all_reduce(np.ones(70_000, np.float32), op="max")
        except gradwire.GradwireError as error:
            return str(error)
    return "nothing happened"


def test_where_verbs_were_asked_for_a_failing_network_ends_the_group_with_the_reason(
    tmp_path: Path, _network: None
) -> None:
    ranks = forked.start(2, _insists, str(tmp_path))
    while not all(Path(tmp_path, f"ready{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    link(DEVICE, "down")
    for text in ranks.results():
        assert "queue pair" in text and "rank" in text, text


def _meets(rank: int, size: int, url: str) -> str:
    try:
        gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=20.0).close()
    except (gradwire.GradwireError, ValueError) as error:
        return str(error)
    return "it met"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GRADWIRE_IB_HCA", "mlx5", "mlx5"),
        ("GRADWIRE_IB_GID_INDEX", "200", "200"),
        ("GRADWIRE_IB_RETRIES", "7", "0 to 6"),
    ],
)
def test_settings_that_no_device_fits_are_refused_with_what_to_do(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for text in forked(2, _meets):
        assert said in text, text


def test_a_gid_that_is_chosen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_IB_GID_INDEX", os.environ["SOFTROCE_GID_INDEX"])
    assert forked(2, exchange_everything) == [["verbs"], ["verbs"]]


def test_memory_that_cannot_be_pinned_is_told_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may pin what it likes; nobody else may pin more than this.
    limited = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "prlimit", "--memlock=65536:65536"]
    program = (
        "import gradwire, sys\n"
        "try: gradwire.Communicator(sys.argv[1], rank=int(sys.argv[2]), world_size=2, timeout_s=20.0)\n"
        "except (gradwire.GradwireError, ValueError) as error: print(error)\n"
    )
    python = os.environ.get("PYTHON", "python3")
    url = f"file://{os.environ.get('TMPDIR', '/tmp')}/gradwire-pins"
    command = [*limited, python, "-c", program, url]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks:
        out, _ = rank.communicate(timeout=60)
        assert "ulimit -l" in out and "65536" in out, out


def test_sigterm_of_a_server_says_goodbye_over_queue_pairs() -> None:
    with serve(shards=1) as addresses:
        client = gradwire.connect(addresses, rank=0)
        client.dense("t", 10, rule=gradwire.SGD(lr=0.1), workers=1)
        assert serve.stop(signal.SIGTERM) == 0


def _summed_on_devices(rank: int, size: int, url: str, path: str) -> tuple[str, str, str]:
    os.environ["GRADWIRE_CUDA_LIBRARY"] = os.environ["GRADWIRE_NVRTC_LIBRARY"] = path
    cuda = Driver(path, rank)
    with gradwire.Communicator(url, rank=rank, world_size=size, timeout_s=60.0) as group:
        array = cuda.array(np.full(1_200_000, rank + 1, np.float32))
        group.all_reduce(array)
        assert (cuda.numpy(array) == 3).all()
        lane, long, folded = group.describe().devices
        return lane, long, folded


def test_a_card_that_takes_no_memory_of_a_gpu_says_so_and_all_is_staged(tmp_path: Path) -> None:
    """A double's memory has no dma-buf: the device is shown a memfd, and refuses it as it refuses every one."""
    why = "refuses dma-buf: Operation not supported (95); nvidia_peermem is not loaded"
    for lane, long, folded in forked(2, _summed_on_devices, build(tmp_path)):
        assert f"(no GPU-direct RDMA: rxe0 {why})" in lane, lane
        assert "as devices do not reach each other (rank 0: no GPU-direct RDMA: rxe0:1" in long and why in long, long
        # Where what is staged is folded was measured.
        assert folded.startswith("reductions of several rounds folded where that takes less"), folded
