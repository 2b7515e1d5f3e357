"""All-reduce of PyTorch's tensors between two processes: gradwire beside Gloo, in turns, on the same tensors.

    python bench/peers/gpu_vs_gloo.py                 on the GPU; two processes share one where there is no second
    python bench/peers/gpu_vs_gloo.py --device cpu    in the host's memory, where there is none

Each result is checked before it is timed. A row: bytes, median microseconds of both, and how many times as long Gloo takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

RANKS = 2
PEERS = ("gradwire", "gloo")
#: Calls before those that count.
WARM_UP = 3


def timed(group: dist.ProcessGroup, tensor: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return (time.perf_counter() - began) * 1e6


def rank_main(rank: int, folder: str, device: str, sizes: list[int], calls: int) -> None:
    place = torch.device(device, rank % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
    dist.init_process_group("gradwire", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    groups = {"gradwire": dist.distributed_c10d._get_default_group(), "gloo": dist.new_group(backend="gloo")}
    if rank == 0:
        name = torch.cuda.get_device_name(place) if device == "cuda" else "the host's memory"
        print(f"all_reduce of float32 in {name}, {RANKS} processes: median us")
        print(f"{'bytes':>12} {'gradwire':>12} {'gloo':>12} {'times':>8}", flush=True)
    for size in sizes:
        tensor = torch.empty(size // 4, device=place)
        for group in groups.values():
            tensor.fill_(rank + 1)
            dist.all_reduce(tensor, group=group)
            assert bool((tensor == RANKS * (RANKS + 1) / 2).all()), f"a wrong sum over {size} bytes"
        tensor.zero_()
        times: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for call in range(WARM_UP + calls):
            for peer in PEERS:
                took = timed(groups[peer], tensor)
                if call >= WARM_UP:
                    times[peer].append(took)
        if rank == 0:
            ours, theirs = (statistics.median(times[peer]) for peer in PEERS)
            print(f"{size:>12} {ours:>12.1f} {theirs:>12.1f} {theirs / ours:>8.2f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64 << 10, 1 << 20, 16 << 20, 64 << 20], metavar="BYTES")
    parser.add_argument("--calls", type=int, default=20, help="timed calls a size (default %(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device: --device cpu compares in the host's memory")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(rank_main, (folder, options.device, options.sizes, options.calls), RANKS)


if __name__ == "__main__":
    main()
