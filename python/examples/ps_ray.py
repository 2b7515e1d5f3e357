"""Trains the network of ddp_digits.py with Ray: an actor holds the parameter servers, and one a worker trains.

    pip install ray && python python/examples/ps_ray.py --server target/release/gradwire-ps

Ray is not among what this project's tests install: it was run by hand, with Ray 2.60.0 on one node of two cores. What it runs on the
servers is what ps_torchrun.py runs.

Ray places the actors wherever the cluster has room; the servers listen at the address that Ray knows their node by. On several nodes
each needs gradwire, this folder and the binary, at the same places.
"""

import argparse
import secrets

import ray
from ps_torchrun import start_servers, train
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import gradwire


# They sleep while nobody asks, so none of Ray's cores is set aside for them.
@ray.remote(num_cpus=0)
class Servers:
    """The process with the servers, as long as this actor lives."""

    def __init__(self, binary, shards, token):
        host = ray.util.get_node_ip_address()
        self._process, self._addresses = start_servers(binary, shards, token, host)

    def addresses(self):
        return self._addresses

    def stop(self):
        self._process.terminate()
        return self._process.wait(timeout=10)


@ray.remote(num_cpus=1)
def work(addresses, token, rank, size, epochs):
    """One worker: how much of the held-out digits it gets right in the end."""
    with gradwire.connect(addresses, token=token, rank=rank) as client:
        return train(client, rank, size, epochs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="gradwire-ps", help="the binary, on the servers' node")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()

    ray.init()
    size = arguments.workers
    # They train in step: some that run and wait for others which Ray has no room for would wait in vain.
    room = placement_group([{"CPU": 1}] * size)
    if not room.wait(60):
        raise RuntimeError(f"Ray has no room for {size} workers, a core each: begin fewer (--workers), or add nodes")
    token = secrets.token_hex(32)
    servers = Servers.remote(arguments.server, arguments.shards, token)
    addresses = ray.get(servers.addresses.remote())
    try:
        worker = work.options(scheduling_strategy=PlacementGroupSchedulingStrategy(room))
        right = ray.get([worker.remote(addresses, token, rank, size, arguments.epochs) for rank in range(size)])
        print(f"{size} workers, {len(addresses)} servers: held-out accuracy {right[0]:.1%}")
    finally:
        ray.get(servers.stop.remote())
        ray.shutdown()


if __name__ == "__main__":
    main()
