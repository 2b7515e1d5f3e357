"""Trains the network of ddp_digits.py with its optimizer on parameter servers within this process, one worker a thread.

    python python/examples/ps_digits.py

For real use, start `gradwire-ps serve` on other machines and one process a worker: only the `connect` line changes.
"""

import threading

import torch
from ddp_digits import digits, network
from torch import nn

import gradwire
from gradwire.torch import DistributedOptimizer

WORKERS = 2


def worker(cluster, rank, models):
    images, labels, test_images, test_labels = digits()
    model = models[rank]
    with cluster.connect(rank=rank) as client:
        optimizer = DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), client, workers=WORKERS)
        for epoch in range(8):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
            for start in range(0, len(order) - 63, 64):
                mine = order[start : start + 64][rank::WORKERS]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
                optimizer.step()
        if rank == 0:
            right = (model(test_images).argmax(1) == test_labels).float().mean().item()
            print(f"held-out accuracy {right:.1%}")


def main():
    # Made one after the other: networks draw their first weights from one random state.
    models = [network() for _ in range(WORKERS)]
    with gradwire.LocalCluster(servers=2) as cluster:
        threads = [threading.Thread(target=worker, args=(cluster, rank, models)) for rank in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
