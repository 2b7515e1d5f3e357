"""Tables with copies, and checkpoints of them: what is left where both servers of a shard are gone."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time

import numpy
import pytest

import gradwire
from test_ps_checkpoints import BINARY

SIZE, WORKERS = 20_000, 2
IDS = numpy.arange(0, 600, 3, dtype=numpy.int64)


class Cluster:
    """A coordinator and two servers, which keep checkpoints in one folder."""

    def __init__(self, folder, shards, *restore, kept=True):
        self.processes, self.shards = [], shards
        self.kept = ["--checkpoint-dir", str(folder)] if kept else []
        self.coordinator = self.start("coordinate", "--shards", str(shards), *restore)
        self.servers = [self.serve() for _ in range(2)]

    def start(self, *arguments):
        environment = {**os.environ, "GRADWIRE_TOKEN": "secret", "GRADWIRE_LOG": "off"}
        process = subprocess.Popen([BINARY, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
        self.processes.append(process)
        return re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())[0]

    def serve(self):
        self.start("serve", "--shards", str(self.shards), "--coordinator", self.coordinator, *self.kept)
        return self.processes[-1]

    def connect(self, rank, **settings):
        settings = {"timeout_s": 60, "reconnect_s": 20, **settings}
        return gradwire.connect(coordinator=self.coordinator, token="secret", rank=rank, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


def tables(client, recovery="replicate"):
    rule = gradwire.Adam(lr=0.01)
    dense = client.dense("w", SIZE, rule=rule, workers=WORKERS, recovery=recovery)
    return dense, client.sparse("rows", 4, optimizer=rule, workers=WORKERS, recovery=recovery)


def train(connect, last, recovery="replicate", and_then=lambda client: None):
    """Two workers go on to clock `last`; the values then, and what `and_then` of worker 0 gives."""
    results, errors = {}, []

    def work(rank):
        try:
            with connect(rank) as client:
                dense, sparse = tables(client, recovery)
                assert dense.clock == sparse.clock
                for step in range(dense.clock + 1, last + 1):
                    steps = numpy.arange(SIZE, dtype=numpy.float32)
                    pushed = dense.push_async((steps * 7 + rank) % 13 / numpy.float32(step) - 0.3)
                    sparse.push(IDS, numpy.full((len(IDS), 4), rank + 1 / step, numpy.float32))
                    pushed.wait()
                results[rank] = (dense.pull(), sparse.pull(IDS), and_then(client) if rank == 0 else None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


def test_a_cluster_whose_servers_are_all_gone_begins_with_its_latest_checkpoint(tmp_path):
    with gradwire.LocalCluster(servers=2) as alone:
        expected = train(lambda rank: gradwire.connect(alone.addresses, rank=rank), 7, recovery="none")
    with Cluster(tmp_path, 2) as cluster:
        train(cluster.connect, 2, and_then=lambda client: client.snapshot())
        # The next one is written by whoever took over.
        cluster.servers[0].kill()
        *_, written = train(cluster.connect, 4, and_then=lambda client: client.snapshot())
        assert written.clocks == {"rows": 4, "w": 4}
        train(cluster.connect, 5)
    for shards in [2, 3]:
        with Cluster(tmp_path, shards, "--restore", "latest", "--checkpoint-dir", str(tmp_path)) as cluster:
            with cluster.connect(0) as client:
                assert [table.clock for table in tables(client)] == [4, 4]
            # What was restored has its copy, too.
            cluster.servers[1].kill()
            got = train(cluster.connect, 7)
        assert all(numpy.array_equal(one, other) for one, other in zip(got[:2], expected[:2])), shards


def test_a_cluster_that_cannot_read_its_checkpoint_is_never_taken_for_an_empty_one(tmp_path):
    with Cluster(tmp_path, 1) as cluster:
        *_, written = train(cluster.connect, 2, and_then=lambda client: client.snapshot())
    restore = ("--restore", written.name, "--checkpoint-dir", str(tmp_path))
    with Cluster(tmp_path, 1, *restore, kept=False) as cluster:
        with pytest.raises(gradwire.GradwireError, match="shard 0 has no"):
            cluster.connect(0, timeout_s=3, reconnect_s=1)
        # Two that have been told where it is take over.
        for server in cluster.servers:
            server.kill()
        cluster.kept = ["--checkpoint-dir", str(tmp_path)]
        for _ in range(2):
            cluster.serve()
        deadline = time.monotonic() + 30
        while True:
            try:
                with cluster.connect(0, timeout_s=5, reconnect_s=1) as client:
                    assert tables(client)[0].clock == 2
                    break
            except gradwire.GradwireError:
                assert time.monotonic() < deadline
    refused = subprocess.run(
        [BINARY, "coordinate", "--restore", "never", "--checkpoint-dir", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0 and written.name in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("command", "flags", "reason"),
    [
        ("serve", ["--restore", "latest"], "coordinate --restore"),
        ("serve", ["--checkpoint-every", "1m"], "snapshot --coordinator"),
        ("coordinate", ["--restore", "latest", "--replicas", "0"], "without copies"),
    ],
)
def test_what_cannot_be_kept_together_is_refused_with_the_way_to_it(tmp_path, command, flags, reason):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "shard-0-of-1.manifest").write_text("whole by its name")
    place = ["--checkpoint-dir", tmp_path] + (["--coordinator", "127.0.0.1:1"] if command == "serve" else [])
    refused = subprocess.run([BINARY, command, *place, *flags], capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and reason in refused.stderr, refused.stderr
