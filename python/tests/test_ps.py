"""The parameter server from Python: tables, bad input, lost servers, and the same training as one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import gradwire
from gradwire.torch import DistributedOptimizer

BINARY = Path(__file__).resolve().parents[2] / "target" / "release" / "gradwire-ps"


def on_workers(cluster, count, body):
    """Runs `body(client, rank)` on threads, one a worker, each with a client of its own; their results by rank."""
    results = [None] * count

    def run(rank):
        try:
            with cluster.connect(rank=rank, timeout_s=60) as client:
                results[rank] = body(client, rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_table_adds_what_workers_push_and_gives_it_back(servers, dtype):
    shape = (3, 100_003)
    first = (numpy.arange(3 * 100_003) % 50).reshape(shape).astype(dtype)

    def work(client, rank):
        table = client.dense("weights", shape, dtype, workers=2)
        table.init(first if rank == 0 else first)
        for step in range(3):
            table.push(numpy.full(shape, rank + 1 + step, dtype))
        out = numpy.empty(shape, dtype)
        assert table.pull(out) is out
        late = table.push_pull_async(numpy.ones(shape, dtype))
        return out, late.wait(60)

    with gradwire.LocalCluster(servers=servers) as cluster:
        for out, late in on_workers(cluster, 2, work):
            numpy.testing.assert_array_equal(out, first + (1 + 2 + 2 + 3 + 3 + 4))
            numpy.testing.assert_array_equal(late, out + 2)


def test_torch_tensors_are_pushed_and_filled_in_place():
    with gradwire.LocalCluster() as cluster, cluster.connect() as client:
        table = client.dense("t", (4, 5), torch.bfloat16)
        table.push(torch.full((4, 5), 1.5, dtype=torch.bfloat16))
        out = torch.empty((4, 5), dtype=torch.bfloat16)
        table.pull(out)
        assert (out == 1.5).all()


def test_bad_input_is_refused_by_name_and_the_server_goes_on():
    with gradwire.LocalCluster(servers=2, token="right") as cluster:
        with pytest.raises(gradwire.AuthenticationError, match="TOKEN"):
            gradwire.connect(cluster.addresses, token="wrong", reconnect_s=2)
        with cluster.connect(rank=0) as client:
            table = client.dense("w", (10,), workers=1)
            good = numpy.ones(10, numpy.float32)
            with pytest.raises(ValueError, match=r"shape \(10,\).*gradient has \(9,\)"):
                table.push(numpy.ones(9, numpy.float32))
            with pytest.raises(ValueError, match="int32"):
                table.push(numpy.ones(10, numpy.int32))
            with pytest.raises(ValueError, match="contiguous"):
                table.push(numpy.ones((10, 2), numpy.float32)[:, 0])
            with pytest.raises(ValueError, match="out has dtype float64"):
                table.pull(numpy.empty(10))
            read_only = numpy.ones(10, numpy.float32)
            read_only.flags.writeable = False
            with pytest.raises(ValueError, match="read-only"):
                table.pull(read_only)
            with pytest.raises(gradwire.ServerRefusedError) as refused:
                client.dense("w2", (10,))
                with cluster.connect() as other:
                    other.dense("w2", (11,))
            assert "w2" in str(refused.value) and "11" in str(refused.value)
            with pytest.raises(ValueError, match="int8"):
                client.dense("w3", (1,), "int8")
            table.push(good)
            numpy.testing.assert_array_equal(table.pull(), good)


def test_a_worker_that_does_not_push_is_a_timeout_not_a_hang():
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0, timeout_s=0.5) as client:
        table = client.dense("w", (10,), workers=2)
        table.init(numpy.zeros(10, numpy.float32))
        began = time.monotonic()
        with pytest.raises((gradwire.ServerTimeoutError, gradwire.ServerRefusedError)):
            table.push_pull(numpy.ones(10, numpy.float32))
        assert time.monotonic() - began < 10


def serve(*options, token="secret"):
    """Starts the binary; the process and where it listens."""
    environment = {**os.environ, "GRADWIRE_TOKEN": token, "GRADWIRE_LOG": "off"}
    command = [BINARY, "serve", "--listen", "127.0.0.1:0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return server, re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())[0]


def test_a_server_killed_under_pushes_is_named():
    server, address = serve()
    with gradwire.connect(address, token="secret", rank=0, reconnect_s=0.5) as client:
        table = client.dense("w", (1_000_000,), workers=1)
        gradient = numpy.ones(1_000_000, numpy.float32)
        table.push(gradient)
        threading.Timer(0.1, server.kill).start()
        began = time.monotonic()
        with pytest.raises(gradwire.ServerLostError) as lost:
            while time.monotonic() - began < 20:
                table.push_pull(gradient)
        assert lost.value.shard == 0 and lost.value.address == address and address in str(lost.value)
        assert time.monotonic() - began < 10
    server.wait()


def test_the_binary_stops_cleanly_when_told_to():
    server, address = serve()
    with gradwire.connect(address, token="secret") as client:
        client.dense("w", (10,)).push(numpy.ones(10, numpy.float32))
        assert client.status()[0]["tables"][0]["name"] == "w"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0


def test_a_forked_child_refuses_its_parent_s_client_and_leaves_it_alone():
    with gradwire.LocalCluster(servers=10) as cluster, cluster.connect(rank=0, timeout_s=20) as client:
        table = client.dense("w", 10)
        table.push(numpy.ones(10, numpy.float32))
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                refused = [client.status, table.pull, lambda: table.clock, lambda: cluster.stop_server(0)]
                for call in refused:
                    with pytest.raises(RuntimeError, match="belongs to the parent"):
                        call()
                client.close()
                del refused, call, table, client, cluster
                os.write(write, b"refused, and dropped")
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            assert answer.read() == "refused, and dropped"
        os.waitpid(pid, 0)
        table.push(numpy.ones(10, numpy.float32))
        assert (table.pull() == 2).all() and len(client.status()) == 10


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (16,), generator=generator)


def steps(model, optimizer, rank, size, scheduler=None):
    for step in range(20):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rank::size]), labels[rank::size]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    ],
    ids=["sgd", "adam", "adamw", "adagrad"],
)
@pytest.mark.parametrize("servers", [1, 2])
def test_training_on_servers_is_training_in_one_process(make, servers):
    halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    alone = network()
    optimizer = make(alone.parameters())
    expected = steps(alone, optimizer, 0, 1, halve(optimizer))
    models = [network() for _ in range(2)]

    def work(client, rank):
        optimizer = DistributedOptimizer(make(models[rank].parameters()), client, workers=2)
        return steps(models[rank], optimizer, rank, 2, halve(optimizer))

    with gradwire.LocalCluster(servers=servers) as cluster:
        first, second = on_workers(cluster, 2, work)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() < 1e-12


def test_workers_begin_with_the_first_one_s_values():
    def work(client, rank):
        model = models[rank]
        DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), client, workers=2)
        return model.weight.detach().clone()

    models = [nn.Linear(4, 4) for _ in range(2)]
    with gradwire.LocalCluster() as cluster:
        first, second = on_workers(cluster, 2, work)
    assert torch.equal(first, second)


def test_gradients_add_up_over_several_backward_passes():
    model = nn.Linear(3, 1, bias=False).double()
    before = model.weight.detach().clone()
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), client, workers=1, backward_passes_per_step=2
        )
        for _ in range(2):
            model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert torch.allclose(model.weight, before - 2.0)
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="no gradient"):
            optimizer.step()


def test_what_the_servers_do_not_know_is_refused():
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        parameters = list(nn.Linear(2, 2).parameters())
        with pytest.raises(ValueError, match="amsgrad"):
            DistributedOptimizer(torch.optim.Adam(parameters, amsgrad=True), client, workers=1)
        with pytest.raises(ValueError, match="RMSprop"):
            DistributedOptimizer(torch.optim.RMSprop(parameters), client, workers=1)


def test_the_example_reaches_its_accuracy():
    example = Path(__file__).resolve().parents[1] / "examples" / "ps_digits.py"
    ran = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert float(re.search(r"held-out accuracy ([\d.]+)%", ran.stdout)[1]) >= 95
