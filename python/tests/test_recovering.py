"""Tables that their workers give again: servers are killed in the middle of training, and nothing shows of it but the pause."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from pathlib import Path

import numpy
import pytest
import torch
from test_ps import network, on_workers, steps

import gradwire
from gradwire.torch import DistributedOptimizer

BINARY = Path(__file__).resolve().parents[2] / "target" / "release" / "gradwire-ps"


class Servers:
    """Two servers as processes of their own, which are killed and started again where they were."""

    def __init__(self):
        self.processes, self.addresses = [], []
        for _ in range(2):
            process, address = self.start("127.0.0.1:0")
            self.processes.append(process)
            self.addresses.append(address)

    def start(self, address):
        command = [BINARY, "serve", "--listen", address, "--json", "--log", "error"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return process, json.loads(process.stdout.readline())["address"]

    def kill(self, shard):
        self.processes[shard].kill()
        self.processes[shard].wait()
        self.processes[shard].stdout.close()

    def restart(self, shard):
        self.kill(shard)
        self.processes[shard], _ = self.start(self.addresses[shard])

    def connect(self, **settings):
        return gradwire.connect(self.addresses, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for shard in range(2):
            self.kill(shard)


class AndThen:
    """A scheduler, so that `steps` calls it after each step: then `more` is done, told of how many steps there were."""

    def __init__(self, scheduler, more):
        self.scheduler, self.more, self.done = scheduler, more, 0

    def step(self):
        self.scheduler.step()
        self.done += 1
        self.more(self.done)


SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)
ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.01)


def train(make, where, kills):
    models = [network() for _ in range(2)]

    def work(client, rank):
        inner = make(models[rank].parameters())
        optimizer = DistributedOptimizer(inner, client, workers=2, where=where, recovery="workers")

        def kill(done):
            if kills and rank == 0 and done % 4 == 0:
                # Both at once in the end: nothing of the model is left but what the workers have.
                for shard in [0, 1] if done == 16 else [done // 4 % 2]:
                    servers.restart(shard)

        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return steps(models[rank], optimizer, rank, 2, AndThen(scheduler, kill))

    with Servers() as servers:
        first, second = on_workers(servers, 2, work)
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize(("make", "where"), [(SGD, "server"), (ADAM, "worker")], ids=["sgd there", "adam here"])
def test_training_ends_with_the_bits_of_an_undisturbed_one(make, where):
    assert torch.equal(train(make, where, kills=True), train(make, where, kills=False))


class Gate:
    """Passes bytes on to a server, until it is cut: whoever calls while it is shut is let go."""

    def __init__(self, server):
        host, port = server.rsplit(":", 1)
        self.server, self.shut, self.open = (host, int(port)), False, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if self.shut:
                    near.close()
                    continue
                far = socket.create_connection(self.server)
                self.open += [near, far]
                for pair in [(near, far), (far, near)]:
                    threading.Thread(target=self.pass_on, args=pair, daemon=True).start()

    def pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while some := source.recv(1 << 16):
                target.sendall(some)
            target.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.shut = True
        for one in self.open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open.clear()


def test_a_worker_that_alone_is_cut_off_from_a_server_calls_the_other():
    models, lost = [network() for _ in range(2)], []

    def work(client, rank, gate):
        inner = SGD(models[rank].parameters())
        optimizer = DistributedOptimizer(inner, client, workers=2, recovery="workers")
        recover = client.recover

        def counted(values):
            lost.append(rank)
            gate.shut = gate.shut and rank != 0
            return recover(values)

        client.recover = counted

        def cut(done):
            if rank == 0 and done in (5, 12):
                gate.cut()

        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return steps(models[rank], optimizer, rank, 2, AndThen(scheduler, cut))

    with Servers() as servers:
        gate = Gate(servers.addresses[1])

        class Cluster:
            def connect(self, rank, **settings):
                second = gate.address if rank == 0 else servers.addresses[1]
                return gradwire.connect([servers.addresses[0], second], rank=rank, reconnect_s=0.3, **settings)

        first, second = on_workers(Cluster(), 2, lambda client, rank: work(client, rank, gate))
        gate.listener.close()
    assert {0, 1} == set(lost), "both recovered, though one of them lost nothing"
    assert torch.equal(first, second) and torch.equal(first, train(SGD, "server", kills=False))


def test_what_a_lost_server_had_of_adam_begins_anew_and_training_goes_on():
    undisturbed, recovered = train(ADAM, "server", kills=False), train(ADAM, "server", kills=True)
    assert recovered.isfinite().all() and not torch.equal(recovered, undisturbed)
    # Twenty steps of 0.01 at most each way: a burst of too large steps would show.
    assert (recovered - undisturbed).abs().max() < 0.2


def test_tables_are_recovered_by_hand_and_the_latest_value_counts():
    pulled = threading.Barrier(2)
    with Servers() as servers:

        def work(client, rank):
            table = client.dense("w", 1000, workers=2, recovery="workers")
            value = table.pull()
            assert table.pulled == 0
            table.push(numpy.full(1000, rank + 1, numpy.float32))
            if rank == 0:
                table.pull(value)
                assert table.pulled == 1 and (value == 3).all()
            # Not a barrier of the servers, whose last word to the other worker might be lost with them.
            pulled.wait()
            if rank == 0:
                servers.restart(0)
                servers.restart(1)
                with pytest.raises(gradwire.ServerLostError, match="without the tables"):
                    table.pull()
            client.recover([(table, value)])
            assert (table.clock, table.pulled) == (1, 1) and (value == 3).all()
            return table.push_pull(numpy.ones(1000, numpy.float32))

        first, second = on_workers(servers, 2, work)
        assert (first == 5).all() and (second == 5).all()


def test_what_cannot_be_is_refused_with_the_reason():
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0, timeout_s=1) as client:
        with pytest.raises(ValueError, match="at no clock"):
            client.dense("w", 10, recovery="workers")
        with pytest.raises(ValueError, match="compression"):
            client.dense("w", 10, workers=1, recovery="workers", compression="bf16")
        with pytest.raises(gradwire.ServerRefusedError, match="--checkpoint-dir"):
            client.dense("w", 10, recovery="checkpoint")
        with pytest.raises(ValueError, match="none of whom has all rows"):
            client.sparse("rows", 4, workers=1, recovery="workers")
        with pytest.raises(ValueError, match='"none", "checkpoint", CheckpointEvery.*, "replicate", Replicate.* or "workers"'):
            client.dense("w", 10, recovery="magic")
        table = client.dense("w", 10, workers=1, recovery="workers")
        with pytest.raises(ValueError, match="nobody has its values"):
            client.recover([(table, numpy.zeros(10, numpy.float32))])
        with pytest.raises(ValueError, match="shape"):
            client.recover([(table, numpy.zeros(11, numpy.float32))])
        with pytest.raises(ValueError, match="float64"):
            client.recover([(table, numpy.zeros(10))])
        other = client.dense("other", 10, workers=2, recovery="workers")
        other.pull()
        with pytest.raises(gradwire.ServerTimeoutError, match="worker 1"):
            client.recover([(other, numpy.zeros(10, numpy.float32))])
