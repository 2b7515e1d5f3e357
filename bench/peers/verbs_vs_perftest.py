"""RDMA verbs beside perftest, in one boot, in turns: our messages and writes, ib_write_bw and ib_write_lat; medians and ratios.

    scripts/softroce-vm -- python3 bench/peers/verbs_vs_perftest.py               both ends on one host
    scripts/softroce-vm -n 2 -- python3 bench/peers/verbs_vs_perftest.py          two: all-reduce beside ib_write_bw -b
    python3 bench/peers/verbs_vs_perftest.py --rank 0 --peer 192.0.2.2 --gid 3    on two hosts with real devices; then --rank 1

Needs perftest, and target/release/gradwire-bench (scripts/setup builds it). Ours verifies every result before it is timed.
The two take turns, so that a change of the machine's pace meets both; a figure is the median of --rounds runs. Over an rxe
device the figures are of function and ratios, never RDMA speed. `--json` prints one object a line.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

BENCH = pathlib.Path(__file__).resolve().parents[2] / "target/release/gradwire-bench"
PATIENCE_S = 120
MIB = 1 << 20


def run(command, others=()):
    """The output of a command, which must succeed; its other ends are ended first where it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    finally:
        for other in others:
            if other.poll() is None and sys.exc_info()[0]:
                other.kill()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def perftest(tool, options, column, here, port):
    """One run of a perftest tool; the value of a column of its last row. As server it tells nothing."""
    base = [tool, "-F", "-x", str(here.gid), "-p", str(port), *options]
    if here.rank == 0:
        server = subprocess.Popen(base, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if here.peer is None:
            text = client([*base, "127.0.0.1"], server)
        server.wait(PATIENCE_S)
        if here.peer is not None:
            return None
    else:
        text = client([*base, here.peer])
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == [options[options.index("-s") + 1]]]
    return float(rows[-1][column])


def client(command, server=None):
    """A client, tried again until its server listens."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return run(command, [server] if server else [])
        except RuntimeError as error:
            if time.monotonic() > until or (server and server.poll() is not None) or "connect" not in str(error).lower():
                raise
            time.sleep(0.1)


def ours(path, figure, size, count):
    """One run of ours, both ends in one process."""
    rounds = max(1, count * size // (64 << 10)) if size > 64 << 10 else count
    options = ["--path", path, "--only", figure, "--min-bytes", str(size), "--max-bytes", str(size)]
    row = json.loads(run([str(BENCH), "verbs", "--json", "--rounds", str(rounds), *options]).splitlines()[-1])
    return row["mb_per_s"] if figure == "bandwidth" else row["p50_us"]


def one_host(here, turn):
    """Every figure once: {(what, unit): {who: value}}."""
    port = here.port + 10 * turn
    results = {}
    for at, (name, size, count) in enumerate((("64 KiB", 64 << 10, 800), ("1 MiB", MIB, 64))):
        options = ["-s", str(size), "-n", str(count)]
        row = {"ib_write_bw": perftest("ib_write_bw", options, 3, here, port + at) * MIB / 1e6}
        for path in here.paths:
            row[path] = ours(path, "bandwidth", size, count)
        results[f"{name}, MB/s"] = row
    # The typical time, as perftest calls the median.
    row = {"ib_write_lat": perftest("ib_write_lat", ["-s", "8", "-n", "2000"], 4, here, port + 5)}
    for path in here.paths:
        row[path] = ours(path, "latency", 8, 2000)
    results["8 B half round trip, µs"] = row
    return results


def two_hosts(here, turn):
    """All-reduce of two ranks beside writes in both directions at once; both count the bytes of both directions."""
    port = here.port + 10 * turn
    both = perftest("ib_write_bw", ["-b", "-s", str(MIB), "-n", "64"], 3, here, port)
    first = here.first
    command = [str(BENCH), "all-reduce", "--wire", "verbs", "--json", "--store", f"tcp://{first}:{port + 1}"]
    command += ["--rank", str(here.rank), "--world-size", "2", "--rounds", "10"]
    rows = [json.loads(line) for line in run([*command, "--min-bytes", str(here.bytes), "--max-bytes", str(here.bytes)]).splitlines()]
    # Each rank sees one of the two figures; they meet in a file of the store's host.
    return {"both": both and both * MIB / 1e6, "rows": rows}


def exchange(here, value, turn):
    """Rank 1 sends its figure to rank 0."""
    import socket

    port = here.port + 10 * turn + 2
    if here.rank == 0:
        with socket.create_server(("", port)) as listener:
            listener.settimeout(PATIENCE_S)
            with listener.accept()[0] as connection, connection.makefile() as file:
                return json.loads(file.readline())
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with socket.create_connection((here.peer, port), 5) as connection:
                connection.sendall((json.dumps(value) + "\n").encode())
                return value
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def tell(here, results):
    """Medians, and each path's ratio to perftest."""
    for what, runs in results.items():
        peer = next(iter(runs))
        for who, values in runs.items():
            ratios = [ours / theirs for ours, theirs in zip(values, runs[peer], strict=True)]
            row = {
                "what": what,
                "who": who,
                "median": round(statistics.median(values), 2),
                "best": round((min if "µs" in what else max)(values), 2),
                "rounds": len(values),
                "of_perftest": round(statistics.median(values) / statistics.median(runs[peer]), 3),
                "of_perftest_by_turn": round(statistics.median(ratios), 3),
                "load": os.getloadavg()[0],
            }
            if here.json:
                print(json.dumps(row, ensure_ascii=False))
            else:
                print(
                    f"{what:>24} {who:>16}: median {row['median']:>9}, best {row['best']:>9}; of {peer}: "
                    f"{row['of_perftest']:.2f} (medians), {row['of_perftest_by_turn']:.2f} (median of turns)"
                )


def main():
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = environment("SOFTROCE_NODES", "1") == "2"
    parser.add_argument("--rounds", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--paths", default="message,write,write-with-imm", help="of ours; see gradwire-bench verbs --help")
    parser.add_argument("--bytes", type=int, default=16 * MIB, help="of all-reduce between two hosts (default 16 MiB)")
    parser.add_argument("--gid", type=int, default=int(environment("SOFTROCE_GID_INDEX", "1")), help="index, for perftest")
    parser.add_argument("--rank", type=int, default=int(environment("SOFTROCE_RANK", "0")), help="of two hosts")
    parser.add_argument("--peer", default=environment("SOFTROCE_PEER") if several else None, help="the other host")
    parser.add_argument("--port", type=int, default=20000, help="first port (default 20000)")
    parser.add_argument("--json", action="store_true")
    here = parser.parse_args()
    here.paths = here.paths.split(",")
    here.first = here.peer if here.rank else environment("SOFTROCE_IP", "0.0.0.0")
    if not here.json and here.rank == 0:
        device = os.listdir("/sys/class/infiniband")[0]
        title = "soft-RoCE under emulation: function and ratios, never RDMA speed" if device.startswith("rxe") else "RDMA"
        print(f"{title}; {device}, Linux {os.uname().release}, {os.cpu_count()} cores, {here.rounds} turns")
    results = {}
    for turn in range(here.rounds):
        if here.peer is None:
            for what, row in one_host(here, turn).items():
                for who, value in row.items():
                    results.setdefault(what, {}).setdefault(who, []).append(value)
            continue
        seen = two_hosts(here, turn)
        both = exchange(here, seen["both"], turn)
        if here.rank == 0:
            row = results.setdefault("both directions, MB/s", {"ib_write_bw -b": [], "all-reduce": []})
            row["ib_write_bw -b"].append(both)
            row["all-reduce"].append(2e3 * seen["rows"][-1]["busbw_gb_per_s"])
    tell(here, results)


if __name__ == "__main__":
    main()
