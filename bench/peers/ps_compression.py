#!/usr/bin/env python3
"""What compression saves, and what it costs: push_pull of one table by two workers to one server, on links of 1 Gb/s.

    scripts/netns-cluster -n 3 -- .venv/bin/python bench/peers/ps_compression.py

Host 0 serves, the others are the workers. Every codec is taken in turn in every round; results are verified first. Prints a
table from worker 0: medians, and the bytes that a worker sends and receives a step. In namespaces of one machine all three
share its cores, so what compressing costs weighs more than on machines of their own.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy

import gradwire

ROOT = pathlib.Path(__file__).resolve().parents[2]
PORT = 7070
CODECS = {
    "none": None,
    "bf16": "bf16",
    "fp16": "fp16",
    "int8": "int8",
    "topk 10 %, pull int8": gradwire.Compression(push=gradwire.TopK(0.1), pull="int8"),
}


def serve(addresses):
    """Host 0: the server, until the workers are done."""
    command = [ROOT / "target" / "release" / "gradwire-ps", "serve", "--listen", f"{addresses[0]}:{PORT}", "--log", "warn"]
    server = subprocess.Popen(command, env={**os.environ, "GRADWIRE_TOKEN": "bench"}, stdout=subprocess.DEVNULL)
    try:
        with gradwire.connect(f"{addresses[0]}:{PORT}", token="bench", reconnect_s=30) as client:
            client.barrier("done", len(addresses), timeout_s=600)
    finally:
        server.terminate()
        server.wait(10)


def work(rank, workers, address, elements, rounds):
    """A worker: (codec, seconds of each step, bytes pushed and pulled a step) for each codec."""
    generator = numpy.random.default_rng(rank)
    gradient = generator.standard_normal(elements, numpy.float32)
    out = numpy.empty(elements, numpy.float32)
    with gradwire.connect(address, token="bench", rank=rank, reconnect_s=30) as client:
        tables, times = {}, {name: [] for name in CODECS}
        for name, codec in CODECS.items():
            table = client.dense(name, elements, rule="replace", workers=workers, average=True, compression=codec)
            tables[name] = table
            table.push_pull(gradient, out)
            whole = table.pull(whole=True)
            gap = abs(whole - out).max() / abs(whole).max()
            if gap > (0.01 if codec else 0):
                sys.exit(f"{name}: what was pulled differs by {gap} of the largest value")
        for _ in range(rounds):
            for name, table in tables.items():
                client.barrier("step", workers)
                began = time.perf_counter()
                table.push_pull(gradient, out)
                times[name].append(time.perf_counter() - began)
        client.barrier("measured", workers)
        [shard] = client.status()
        by_name = {table["name"]: table for table in shard["tables"]}
        # Each worker has pushed and pulled rounds + 1 times, and pulled once in full.
        steps, full = workers * (rounds + 1), workers * elements * 4
        rows = []
        for name in CODECS:
            pushed, pulled = by_name[name]["pushed_bytes"], by_name[name]["pulled_bytes"] - full
            rows.append((name, statistics.median(times[name]), pushed / steps, pulled / steps))
        client.barrier("done", workers + 1)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=16, help="size of the float32 table (16)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each codec (10)")
    arguments = parser.parse_args()
    addresses, host = os.environ["CLUSTER_HOSTS"].split(","), int(os.environ["CLUSTER_RANK"])
    if host == 0:
        return serve(addresses)
    elements = arguments.mib << 18
    rows = work(host - 1, len(addresses) - 1, f"{addresses[0]}:{PORT}", elements, arguments.rounds)
    if host == 1:
        plain = rows[0][1]
        print(f"push_pull of {arguments.mib} MiB float32, {len(addresses) - 1} workers, 1 server, {arguments.rounds} rounds in turns")
        print(f"{'compression':22}{'ms':>8}{'of none':>9}{'MB up':>8}{'MB down':>9}")
        for name, seconds, pushed, pulled in rows:
            print(f"{name:22}{seconds * 1e3:8.1f}{seconds / plain:9.2f}{pushed / 1e6:8.2f}{pulled / 1e6:9.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
