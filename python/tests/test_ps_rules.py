"""Server-side rules and learning rates beside torch.optim: the same numbers, to a stated bound."""

from __future__ import annotations

import numpy
import pytest
import torch
from test_ps import network, on_workers, steps

import gradwire
from gradwire import schedules
from gradwire.torch import DistributedOptimizer
from gradwire.torch.optimizer import _rule

RULES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_torch_s_numbers_but_for_its_fused_multiply_add(name, dtype):
    # A vector and its tail, and numbers from 1e-6 to 10.
    generator = torch.Generator().manual_seed(7)
    draw = lambda: torch.randn(1003, generator=generator, dtype=dtype) * 10 ** (torch.rand(1003, generator=generator) * 7 - 6)
    parameter = torch.nn.Parameter(draw())
    optimizer = RULES[name]([parameter])
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        table = client.dense("w", 1003, dtype, rule=_rule(optimizer, optimizer.param_groups[0]), workers=1)
        table.init(parameter.detach())
        got = torch.empty(1003, dtype=dtype)
        largest = parameter.detach().abs().clamp(min=0.1)
        for _ in range(20):
            parameter.grad = draw()
            table.push_pull(parameter.grad, got)
            optimizer.step()
            largest = torch.maximum(largest, parameter.detach().abs())
    # One rounding more for each operation that torch fuses, of numbers as large as the element has been, in 20 steps.
    error = ((got - parameter.detach()).abs() / largest).max().item() / torch.finfo(dtype).eps
    assert error <= 32, error


def rates_of(schedule, count):
    """The learning rates that a server works out: what each push of 1 takes away."""
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect(rank=0) as client:
        table = client.dense("w", 2, "float64", rule=gradwire.SGD(lr=1.0), workers=1)
        table.set_schedule(schedule)
        out, rates = numpy.zeros(2), []
        for _ in range(count):
            before = out[1]
            table.push_pull(numpy.ones(2), out)
            rates.append(before - out[1])
            assert out[0] == out[1]
        return rates


def rates_of_torch(make, count, lr=0.5):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (schedules.Step(0.5, 3, 0.25), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.25)),
        (schedules.Cosine(0.5, 12, 0.125), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, 0.125)),
        (
            schedules.OneCycle(0.5, 12),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, 12, cycle_momentum=False),
        ),
        (
            schedules.Constant(0.5).warmed_up(5, 0.25),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=5),
        ),
        (
            schedules.Cosine(0.5, 8).warmed_up(4, 0.25),
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=4),
                    torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
                ],
                [4],
            ),
        ),
        (
            schedules.Listed((0.5, 0.25, 1.0)),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (1.0, 0.5, 2.0)[min(step, 2)]),
        ),
    ],
    ids=["step", "cosine", "one-cycle", "warm-up", "warm-up and cosine", "list"],
)
def test_a_schedule_on_the_server_is_torch_s(schedule, make):
    assert rates_of(schedule, 12) == pytest.approx(rates_of_torch(make, 12), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 21, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler(
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
        ),
    ],
    ids=["cosine", "one-cycle", "lambda", "chained"],
)
def test_torch_s_schedulers_work_around_the_optimizer(make):
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    alone = network()
    optimizer = sgd(alone)
    expected = steps(alone, optimizer, 0, 1, make(optimizer))
    models = [network() for _ in range(2)]

    def work(client, rank):
        optimizer = DistributedOptimizer(sgd(models[rank]), client, workers=2)
        return steps(models[rank], optimizer, rank, 2, make(optimizer))

    with gradwire.LocalCluster(servers=2) as cluster:
        first, second = on_workers(cluster, 2, work)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() < 1e-12


def test_a_schedule_of_the_optimizer_is_followed_without_a_message_a_step():
    make = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    alone, ours = network(), network()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01)
    expected = steps(alone, optimizer, 0, 1, make(optimizer))
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        inner = torch.optim.AdamW(ours.parameters(), lr=0.01)
        optimizer = DistributedOptimizer(inner, client, workers=1, schedule=schedules.Cosine(0.01, 20))
        assert (steps(ours, optimizer, 0, 1) - expected).abs().max() < 1e-12
        with pytest.raises(ValueError, match="take the step"):
            DistributedOptimizer(inner, client, workers=1, schedule=schedules.Cosine(0.01, 20), where="worker")


def test_a_scheduler_that_changes_more_than_the_rate_is_refused():
    model = network()
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), client, workers=1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 20)
        with pytest.raises(ValueError, match="cycle_momentum=False"):
            steps(model, optimizer, 0, 1, scheduler)


def test_any_optimizer_may_stay_with_the_workers():
    make = lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5)
    alone = network()
    expected = steps(alone, make(alone), 0, 1)
    models = [network() for _ in range(2)]

    def work(client, rank):
        optimizer = DistributedOptimizer(make(models[rank]), client, workers=2, where="worker")
        return steps(models[rank], optimizer, rank, 2)

    with gradwire.LocalCluster(servers=2) as cluster:
        first, second = on_workers(cluster, 2, work)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() < 1e-12


@pytest.mark.parametrize("where", ["server", "worker"])
@pytest.mark.parametrize("servers", [1, 3])
def test_clipping_is_torch_s_on_the_merged_gradient(servers, where):
    make = lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    alone, norms = network(), []
    optimizer = make(alone)
    plain_step = optimizer.step

    def clipped_step():
        norms.append(torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.3).item())
        plain_step()

    optimizer.step = clipped_step
    expected = steps(alone, optimizer, 0, 1)
    models = [network() for _ in range(2)]

    def work(client, rank):
        optimizer = DistributedOptimizer(make(models[rank]), client, workers=2, max_grad_norm=0.3, where=where)
        return steps(models[rank], optimizer, rank, 2), optimizer.grad_norm

    with gradwire.LocalCluster(servers=servers) as cluster:
        (first, norm), (second, other) = on_workers(cluster, 2, work)
    assert torch.equal(first, second) and norm == other
    assert (first - expected).abs().max() < 1e-12
    assert norm == pytest.approx(norms[-1], rel=1e-12)
    assert max(norms) > 0.3
