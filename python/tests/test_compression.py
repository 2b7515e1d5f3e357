"""Compressed tables: settings, bytes, and training of the digits beside training without, with real processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import ranks
import torch
from test_ps import serve
from torch import nn

import gradwire
from gradwire.torch import DistributedOptimizer

WAYS = {
    "none": None,
    "bf16": "bf16",
    "fp16": "fp16",
    "int8": "int8",
    "topk": gradwire.Compression(push=gradwire.TopK(0.1), pull="int8"),
}
EPOCHS = 12


def train(rank: int, size: int, _: str, address: str) -> dict[str, Any]:
    """Trains as `scripts/demo` does, once a way; its held-out accuracy with the servers' full weights, a digest of them, and its share of bytes."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from ddp_digits import digits, network

    torch.set_num_threads(1)
    images, labels, test_images, test_labels = digits()
    results = {}
    with gradwire.connect(address, token="secret", rank=rank, timeout_s=60) as client:
        for name, compression in WAYS.items():
            model = network()
            inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            optimizer = DistributedOptimizer(inner, client, workers=size, name=name, compression=compression)
            for epoch in range(EPOCHS):
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
                for start in range(0, len(order) - 63, 64):
                    mine = order[start : start + 64][rank::size]
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
                    optimizer.step()
            optimizer.pull_whole()
            with torch.no_grad():
                right = (model(test_images).argmax(1) == test_labels).float().mean().item()
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            tables = [t for s in client.status() for t in s["tables"] if t["name"].startswith(f"{name}/")]
            total = lambda key, tables=tables: sum(table[key] for table in tables)
            shares = [total(f"{way}_bytes") / total(f"{way}_whole_bytes") for way in ("pushed", "pulled")]
            results[name] = (right, weights.numpy().tobytes(), shares)
    return results


def test_compressed_training_ends_within_half_a_percent_and_ranks_agree_to_the_bit() -> None:
    server, address = serve()
    try:
        first, second = ranks.run(2, train, address)
    finally:
        server.terminate()
        server.wait(10)
    for name in WAYS:
        assert first[name][1] == second[name][1], name
        assert first[name][0] >= first["none"][0] - 0.005, (name, first[name][0], first["none"][0])
    assert first["none"][0] >= 0.96
    pushed, pulled = zip(*(first[name][2] for name in WAYS), strict=True)
    assert pushed == pytest.approx((1, 0.5, 0.5, 0.26, 0.2), abs=0.02)
    # The first pull is in full, and the last.
    assert pulled == pytest.approx((1, 0.5, 0.5, 0.26, 0.26), abs=0.02)


def test_what_cannot_be_compressed_is_refused_by_name() -> None:
    with gradwire.LocalCluster() as cluster, cluster.connect(rank=0) as client:
        for bad in ("int4", 8, gradwire.Compression(pull=gradwire.TopK(0.5)), gradwire.TopK(0.0)):
            with pytest.raises(ValueError, match=r"compression|top-k"):
                client.dense("w", 4, compression=bad)
        table = client.dense("w", 4, workers=1, compression="int8")
        gradient = numpy.array([0, 1, numpy.inf, 2], numpy.float32)
        with pytest.raises(ValueError, match=r"element 2 of the gradient is inf"):
            table.push(gradient)
        gradient[2] = 1e-30
        numpy.testing.assert_allclose(table.push_pull(gradient), [0, 1, 0, 2], atol=0.02)
        [described] = client.status()[0]["tables"]
        assert described["compression"] == "push int8, pull int8"
        assert described["pushed_bytes"] == 8 and described["pushed_whole_bytes"] == 16


def test_compression_and_clipping_go_together() -> None:
    with gradwire.LocalCluster(servers=2) as cluster, cluster.connect(rank=0) as client:
        rule = gradwire.SGD(lr=1.0)
        table = client.dense("w", 1000, rule=rule, workers=1, clipped=True, compression=gradwire.TopK(0.1))
        gradient = numpy.linspace(0, 1, 1000, dtype=numpy.float32)
        pushed = table.push_pull_async(gradient)
        norm = client.clip_grad_norm([table], 1.0)
        # The largest tenth of each server's half.
        sent = numpy.concatenate([gradient[450:500], gradient[950:]])
        assert norm == pytest.approx(numpy.sqrt((sent.astype(float) ** 2).sum()), rel=1e-6)
        assert numpy.linalg.norm(pushed.wait()) == pytest.approx(1.0, rel=1e-5)
