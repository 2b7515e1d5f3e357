"""Tables with copies, and checkpoints of them: what is left where both servers of a shard are gone."""

from __future__ import annotations

import functools
import subprocess
import time

import numpy
import pytest

import gradwire
from test_ps_checkpoints import BINARY, tables, train
from test_replicas import Cluster

train_copied = functools.partial(train, recovery="replicate")


def kept(folder):
    return ["--checkpoint-dir", str(folder)]


def test_a_cluster_whose_servers_are_all_gone_begins_with_its_latest_checkpoint(tmp_path):
    with gradwire.LocalCluster(servers=2) as alone:
        expected = train(alone.addresses, 7)
    with Cluster(serve=kept(tmp_path)) as cluster:
        train_copied(cluster.connect, 2, and_then=lambda client: client.snapshot())
        # The next one is written by whoever took over.
        cluster.servers[0].kill()
        *_, written = train_copied(cluster.connect, 4, and_then=lambda client: client.snapshot())
        assert written.clocks == {"rows": 4, "w": 4}
        train_copied(cluster.connect, 5)
    for shards in [2, 3]:
        with Cluster(shards, ["--restore", "latest", *kept(tmp_path)], kept(tmp_path)) as cluster:
            with cluster.connect(0) as client:
                assert [table.clock for table in tables(client, "replicate")] == [4, 4]
            # What was restored has its copy, too.
            cluster.servers[1].kill()
            got = train_copied(cluster.connect, 7)
        assert all(numpy.array_equal(one, other) for one, other in zip(got[:2], expected[:2])), shards


def test_a_cluster_that_cannot_read_its_checkpoint_is_never_taken_for_an_empty_one(tmp_path):
    with Cluster(1, serve=kept(tmp_path)) as cluster:
        *_, written = train_copied(cluster.connect, 2, and_then=lambda client: client.snapshot())
    with Cluster(1, ["--restore", written.name, *kept(tmp_path)]) as cluster:
        with pytest.raises(gradwire.GradwireError, match="shard 0 has (no server|0 of 1 backups)"):
            cluster.connect(0, timeout_s=10, reconnect_s=5)
        # Two that have been told where it is take over.
        for server in cluster.servers:
            server.kill()
        for _ in range(2):
            cluster.serve(*kept(tmp_path))
        deadline = time.monotonic() + 30
        while True:
            try:
                with cluster.connect(0, timeout_s=10, reconnect_s=2) as client:
                    assert tables(client, "replicate")[0].clock == 2
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
