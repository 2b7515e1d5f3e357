"""Trains the network of ddp_digits.py on parameter servers: torchrun starts the workers, and rank 0 the servers.

    torchrun --nproc-per-node 2 python/examples/ps_torchrun.py --server target/release/gradwire-ps

On several nodes rank 0's servers listen at MASTER_ADDR. In production start servers by themselves (scripts/deploy) and give
their addresses with --servers: workers may then come and go.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess

import torch
import torch.distributed as dist
from ddp_digits import digits, network
from torch import nn

import gradwire
from gradwire.torch import DistributedOptimizer


def start_servers(binary, shards, token, host):
    """A process with `shards` servers that listen at `host`, and their addresses."""
    command = [binary, "serve", "--shards", str(shards), "--listen", f"{socket.gethostbyname(host)}:0", "--json"]
    environment = os.environ | {"GRADWIRE_TOKEN": token}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [process.stdout.readline() for _ in range(shards)]
    if not all(lines):
        raise RuntimeError(f"{binary} ended with status {process.wait()}: its log says why")
    return process, [json.loads(line)["address"] for line in lines]


def train(client, rank, size, epochs):
    """Trains on this rank's share of each batch; the optimizer runs on the servers."""
    images, labels, test_images, test_labels = digits()
    model = network()
    optimizer = DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), client, workers=size)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(order) - 63, 64):
            mine = order[start : start + 64][rank::size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
    return (model(test_images).argmax(1) == test_labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="gradwire-ps", help="the binary that rank 0 starts (default: on the path)")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--servers", help="addresses of servers that run already, comma-separated")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()

    dist.init_process_group("gradwire")
    rank, size = dist.get_rank(), dist.get_world_size()
    process, told = None, [arguments.servers, os.environ.get("GRADWIRE_TOKEN")]
    try:
        if rank == 0 and not arguments.servers:
            told[1] = told[1] or secrets.token_hex(32)
            process, addresses = start_servers(arguments.server, arguments.shards, told[1], os.environ["MASTER_ADDR"])
            told[0] = ",".join(addresses)
        dist.broadcast_object_list(told)
        with gradwire.connect(told[0], token=told[1], rank=rank) as client:
            right = train(client, rank, size, arguments.epochs)
            client.barrier("trained", size)
        if rank == 0:
            print(f"{size} workers, {len(told[0].split(','))} servers: held-out accuracy {right:.1%}", flush=True)
    finally:
        if process:
            process.terminate()
            process.wait(timeout=10)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
