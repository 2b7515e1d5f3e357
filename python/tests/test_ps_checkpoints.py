"""Checkpoints from Python: written while training, servers killed, gone on with the same bits, and opened by `safetensors`."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import numpy
import pytest
import safetensors
import safetensors.numpy

import gradwire

BINARY = Path(__file__).resolve().parents[2] / "target" / "release" / "gradwire-ps"
ELEMENTS, DIM = 30_000, 4
IDS = numpy.arange(0, 900, 3, dtype=numpy.int64)


class Servers:
    """Servers as processes of their own, killed at the end."""

    def __init__(self, shards, *arguments):
        command = [BINARY, "serve", "--shards", str(shards), "--json", "--log", "error", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.addresses = [json.loads(self.process.stdout.readline())["address"] for _ in range(shards)]

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def tables(client, recovery="none"):
    settings = {"workers": 2, "recovery": recovery}
    rule = gradwire.Adam(lr=0.01)
    return client.dense("w", ELEMENTS, rule=rule, **settings), client.sparse("rows", DIM, optimizer=rule, **settings)


def train(servers, last, and_then=lambda client: None, recovery="none"):
    """Two workers go on from where the servers are to clock `last`; the values then, and what `and_then` of worker 0 gives.

    `servers`: their addresses, or what connects a rank to them.
    """
    results, errors = {}, []
    connect = servers if callable(servers) else lambda rank: gradwire.connect(servers, rank=rank, timeout_s=60)

    def work(rank):
        try:
            with connect(rank) as client:
                dense, sparse = tables(client, recovery)
                assert dense.clock == sparse.clock
                for step in range(dense.clock + 1, last + 1):
                    steps = numpy.arange(ELEMENTS, dtype=numpy.float32)
                    pushed = dense.push_async((steps * 7 + rank) % 13 / numpy.float32(step) - 0.3)
                    sparse.push(IDS, numpy.full((len(IDS), DIM), rank + 1 / step, numpy.float32))
                    pushed.wait()
                results[rank] = (dense.pull(), sparse.pull(IDS), and_then(client) if rank == 0 else None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


def test_killed_servers_go_on_from_their_latest_checkpoint_with_the_bits_of_an_undisturbed_run(tmp_path):
    with gradwire.LocalCluster(servers=2) as cluster:
        expected = train(cluster.addresses, 7)
    with Servers(2, "--checkpoint-dir", tmp_path) as servers:
        *_, written = train(servers.addresses, 4, lambda client: client.snapshot(), recovery="checkpoint")
        assert written.name.startswith("checkpoint-") and written.clocks == {"rows": 4, "w": 4}
        assert written.bytes > 3 * 4 * ELEMENTS and written.seconds > 0
        # What comes after it is lost with them.
        train(servers.addresses, 5, recovery="checkpoint")
        left = gradwire.connect(servers.addresses, rank=0, reconnect_s=0.5)
        table, _ = tables(left, "checkpoint")
        servers.kill()
        with pytest.raises(gradwire.ServerLostError):
            table.push(numpy.zeros(ELEMENTS, numpy.float32))
    for shards in [2, 3]:
        with Servers(shards, "--checkpoint-dir", tmp_path, "--restore", "latest") as servers:
            with gradwire.connect(servers.addresses, rank=1) as client:
                assert [table.clock for table in tables(client, "checkpoint")] == [4, 4]
            got = train(servers.addresses, 7, recovery="checkpoint")
        assert all(numpy.array_equal(one, other) for one, other in zip(got[:2], expected[:2])), shards


def test_who_keeps_no_checkpoints_says_how_to(tmp_path):
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        with pytest.raises(gradwire.ServerRefusedError, match="--checkpoint-dir"):
            client.snapshot()


def run(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments), "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_an_export_is_opened_by_safetensors_changed_and_taken_in_again(tmp_path):
    folder, other, file = tmp_path / "one", tmp_path / "two", tmp_path / "model.safetensors"
    with Servers(3, "--checkpoint-dir", folder) as servers:
        dense, rows, written = train(servers.addresses, 3, lambda client: client.snapshot())
    assert run("export", folder, file) == {"name": written.name, "tables": 2, "bytes": file.stat().st_size}
    tensors = safetensors.numpy.load_file(file)
    assert numpy.array_equal(tensors["w"], dense)
    assert tensors["w::exp_avg"].shape == tensors["w::exp_avg_sq"].shape == (ELEMENTS,)
    order = numpy.argsort(tensors["rows::ids"])
    assert numpy.array_equal(tensors["rows::ids"][order], IDS.astype(numpy.uint64))
    assert numpy.array_equal(tensors["rows"][order], rows)
    assert tensors["rows::exp_avg"].shape == (len(IDS), DIM)
    with safetensors.safe_open(file, "numpy") as opened:
        told = opened.metadata()
    about = json.loads(told["gradwire"])
    assert about["checkpoint"] == written.name
    assert (about["tables"]["w"]["clock"], about["tables"]["w"]["shape"]) == (3, [ELEMENTS])
    assert about["tables"]["rows"]["update_rule"].startswith("adam(learning_rate=0.01")

    tensors["w"] *= 2
    safetensors.numpy.save_file(tensors, file, told)
    run("import", file, other)
    with Servers(2, "--checkpoint-dir", other, "--restore", "latest") as servers:
        with gradwire.connect(servers.addresses, rank=0) as client:
            dense_again, rows_again = tables(client)
            assert (dense_again.clock, rows_again.clock) == (3, 3)
            assert numpy.array_equal(dense_again.pull(), 2 * dense)
            assert numpy.array_equal(rows_again.pull(IDS), rows)


def test_a_table_says_how_often_its_servers_take_a_checkpoint(tmp_path):
    with Servers(2, "--checkpoint-dir", tmp_path) as servers, gradwire.connect(servers.addresses, rank=0) as client:
        careless = client.dense("careless", 10, recovery="checkpoint")
        careless.push(numpy.ones(10, numpy.float32))
        with pytest.raises(ValueError, match="no more often than 1s"):
            client.sparse("rows", 2, recovery=gradwire.CheckpointEvery(0.5))
        with pytest.raises(ValueError, match="CheckpointEvery"):
            client.dense("w", 10, recovery=gradwire.CheckpointEvery(-1))
        time.sleep(2.5)
        assert not list(tmp_path.iterdir()), "nobody asked for one"
        eager = client.sparse("rows", 2, recovery=gradwire.CheckpointEvery(1))
        eager.push(numpy.arange(3), numpy.full((3, 2), 5, numpy.float32))
        # The first may have been begun before the push.
        written, until = set(), time.monotonic() + 60
        while len(written) < 2:
            assert time.monotonic() < until, "two checkpoints, a second apart"
            time.sleep(0.05)
            written |= {one.name for one in tmp_path.iterdir() if len(list(one.glob("*.manifest"))) == 2}
    with Servers(1, "--checkpoint-dir", tmp_path, "--restore", "latest") as servers:
        with gradwire.connect(servers.addresses, rank=0) as client:
            rows = client.sparse("rows", 2, recovery=gradwire.CheckpointEvery(1))
            assert (rows.pull(numpy.arange(3)) == 5).all()
            with pytest.raises(ValueError, match="checkpoint every 1s"):
                client.sparse("rows", 2, recovery="checkpoint")
