"""Servers with backups, as real processes: one is killed in the middle of training, and nothing shows of it."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from pathlib import Path

import numpy
import pytest

import gradwire

BINARY = Path(__file__).resolve().parents[2] / "target" / "release" / "gradwire-ps"
STEPS, SIZE, WORKERS = 30, 50_000, 2


class Cluster:
    """A coordinator, and two servers with room for all shards or copies each; or more, for more copies."""

    def __init__(self, shards=2, coordinate=(), serve=(), copies=1):
        self.processes, self.shards = [], shards
        replicas = () if copies == 1 else ("--replicas", str(copies))
        self.coordinator = self.start("coordinate", "--shards", str(shards), *replicas, *coordinate)
        self.servers = [self.serve(*serve) for _ in range(copies + 1)]

    def start(self, *arguments):
        environment = {**os.environ, "GRADWIRE_TOKEN": "secret", "GRADWIRE_LOG": "off"}
        process = subprocess.Popen([BINARY, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
        self.processes.append(process)
        return re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())[0]

    def serve(self, *flags):
        self.start("serve", "--shards", str(self.shards), "--coordinator", self.coordinator, *flags)
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


def train(kill_at, copies=1):
    """Trains on two workers and kills so many servers after step `kill_at`; the bits of what was learned."""
    results = [None] * WORKERS
    recovery = "replicate" if copies == 1 else gradwire.Replicate(copies)
    with Cluster(copies=copies) as cluster:

        def work(rank):
            with cluster.connect(rank) as client:
                rule = gradwire.Adam(lr=0.01)
                dense = client.dense("w", SIZE, rule=rule, workers=WORKERS, recovery=recovery)
                rows = client.sparse("rows", 8, optimizer=gradwire.Adagrad(), workers=WORKERS, recovery=recovery)
                value = numpy.zeros(SIZE, numpy.float32)
                ids = numpy.arange(100 * rank, 100 * rank + 300)
                for step in range(STEPS):
                    target = numpy.sin(numpy.arange(SIZE, dtype=numpy.float32) * (rank + 1))
                    value = dense.push_pull((value - target) / (step + 1))
                    rows.push(ids, numpy.full((300, 8), rank + step, numpy.float32))
                    if rank == 0 and step == kill_at:
                        [server.kill() for server in cluster.servers[:copies]]
                assert all(shard["role"] == "primary" for shard in client.status())
                results[rank] = value.tobytes() + rows.pull(numpy.arange(400)).tobytes()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results[0] is not None and results[0] == results[1]
    return results[0]


def test_training_over_killed_servers_ends_with_the_bits_of_an_undisturbed_one():
    undisturbed = train(kill_at=None)
    assert train(kill_at=STEPS // 2) == undisturbed
    assert train(kill_at=STEPS // 3, copies=2) == undisturbed


def test_a_replicated_table_needs_servers_with_backups_and_addresses_or_a_coordinator():
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        with pytest.raises(gradwire.ServerRefusedError, match="--coordinator"):
            client.dense("w", 4, recovery="replicate")
        with pytest.raises(gradwire.ServerRefusedError, match="--replicas 2"):
            client.sparse("rows", 4, recovery=gradwire.Replicate(2))
        for none in (0, 8):
            with pytest.raises(ValueError, match="1 to 7"):
                client.dense("w", 4, recovery=gradwire.Replicate(none))
        with pytest.raises(ValueError, match="Replicate"):
            client.dense("w", 4, recovery="always")
    with pytest.raises(ValueError, match="coordinator"):
        gradwire.connect()
