"""All-reduce through torch: gradwire (shared segment, TCP) beside Gloo, in one run.

    .venv/bin/python bench/peers/all_reduce_vs_gloo.py                    print the table
    .venv/bin/python bench/peers/all_reduce_vs_gloo.py --update-readme    and put it into README.md

Every result is verified before it is timed. The ways take turns, call by call, so that a change of the machine's pace meets
all alike; each figure is the median over `--rounds` calls, at least 10. busbw is nccl-tests': bytes / seconds * 2 (n - 1) / n.
"""

import argparse
import datetime
import os
import pathlib
import platform
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]
WAYS = ("gradwire, shared segment", "gradwire, TCP", "Gloo")
README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- all-reduce: begin -->", "<!-- all-reduce: end -->"


def groups(rank, size, folder):
    """One group a way; the wire is chosen when a group is made."""
    torch.set_num_threads(1)
    os.environ["GRADWIRE_TRANSPORT"] = "auto"
    dist.init_process_group("gradwire", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    os.environ["GRADWIRE_TRANSPORT"] = "tcp"
    tcp = dist.new_group(backend="gradwire")
    return dict(zip(WAYS, (dist.group.WORLD, tcp, dist.new_group(backend="gloo")), strict=True))


def measure(rank, size, folder, rounds, results):
    ways = groups(rank, size, folder)
    for nbytes in SIZES:
        mine = torch.arange(nbytes // 4, dtype=torch.float32) % 97 + rank
        expected = (torch.arange(nbytes // 4, dtype=torch.float32) % 97) * size + size * (size - 1) / 2
        times = {way: [] for way in ways}
        count = max(10, min(rounds, rounds * (4 << 20) // nbytes))
        for turn in range(-3, count):
            for way, group in ways.items():
                tensor = mine.clone()
                dist.barrier(group=group)
                began = time.perf_counter()
                dist.all_reduce(tensor, group=group)
                elapsed = time.perf_counter() - began
                if turn < 0 and not torch.equal(tensor, expected):
                    raise SystemExit(f"{way}: wrong sum of {nbytes} bytes")
                if turn >= 0:
                    times[way].append(elapsed)
        if rank == 0:
            results[nbytes] = {way: statistics.median(each) for way, each in times.items()}
    dist.destroy_process_group()


def size_of(nbytes):
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def table(results, size, rounds):
    """The results as Markdown, with what they were measured on."""
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    lines = [
        f"All-reduce of float32 through `torch.distributed`, {size} ranks on one host, loopback: median µs (busbw, GB/s). "
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, torch {torch.__version__}, "
        f"{datetime.date.today()}; up to {rounds} calls a size, taken in turns.",
        "",
        "| bytes | " + " | ".join(WAYS) + " | Gloo ÷ segment | Gloo ÷ TCP |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for nbytes, medians in results.items():
        cells = [
            f"{seconds * 1e6:,.0f} ({nbytes / seconds / 1e9 * 2 * (size - 1) / size:.2f})" for seconds in medians.values()
        ]
        segment, tcp, gloo = medians.values()
        cells += [f"{gloo / segment:.1f} ×", f"{gloo / tcp:.1f} ×"]
        lines.append(f"| {size_of(nbytes)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200, help="calls a size at most (default 200; large ones fewer)")
    parser.add_argument("--update-readme", nargs="?", type=pathlib.Path, const=README, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        work = (arguments.ranks, folder, arguments.rounds, results)
        torch.multiprocessing.spawn(measure, work, nprocs=arguments.ranks)
        text = table(dict(results), arguments.ranks, arguments.rounds)
    print(text)
    if arguments.update_readme:
        readme = arguments.update_readme.read_text(encoding="utf-8")
        before, rest = readme.split(BEGIN)
        arguments.update_readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
