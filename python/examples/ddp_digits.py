"""Trains a small convolutional network on handwritten digits with DistributedDataParallel over gradwire.

    torchrun --nproc-per-node 2 python/examples/ddp_digits.py

Nothing of gradwire is imported: torch finds the backend by its name.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def network():
    """A small convolutional network for 8 x 8 digits, the same on every rank."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def digits():
    """Training and held-out images and labels: 1,437 and 360 of scikit-learn's 1,797."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    return images[train], labels[train], images[held_out], labels[held_out]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="images per step over all ranks (default 64)")
    arguments = parser.parse_args()

    dist.init_process_group("gradwire")
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels, test_images, test_labels = digits()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        total, steps = 0.0, 0
        for start in range(0, len(order) - arguments.batch + 1, arguments.batch):
            mine = order[start : start + arguments.batch][rank::size]
            optimizer.zero_grad()
            loss = loss_of(model(images[mine]), labels[mine])
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        with torch.no_grad():
            right = (model(test_images).argmax(1) == test_labels).float().mean().item()
        if rank == 0:
            print(f"epoch {epoch + 1:2}: loss {total / steps:.4f}, held-out accuracy {right:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
