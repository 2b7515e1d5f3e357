"""Makes the figures of README's section "How fast" again, all by one command, on the machine that it runs on.

    scripts/readme-figures                 all steps, some 3 minutes on a quiet machine of 2 cores
    scripts/readme-figures --quick         fewer rounds, less than a minute: to see that everything runs, not to be kept
    scripts/readme-figures --only servers kernels
    scripts/readme-figures --readme FILE   into another file with the same marks

Each step measures, and replaces the text between its marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Every program
verifies its results before it times them. README is written once, at the end: where a step fails, it stays as it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
BENCH = ROOT / "target" / "release" / "gradwire-bench"
# The longest that one program may take.
PATIENCE_S = 900


class Failed(Exception):
    """A step gave nothing that may be shown."""


def replaced(text, name, body):
    """`text` with `body` between the marks of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Failed(f"there must be one `{begin}`, and one `{end}` behind it")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}"


def size_of(nbytes):
    for unit, name in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")]:
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, {datetime.date.today()}"


def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run(*command):
    """What a program prints; its progress goes on to whoever looks on."""
    try:
        done = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} {command[1]} took more than {PATIENCE_S} s") from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def rows_of(*command):
    rows = [json.loads(line) for line in run(*command, "--json").splitlines() if line.startswith("{")]
    if not rows:
        raise Failed(f"{' '.join(map(str, command))} printed no rows")
    return rows


def all_reduce(readme, quick):
    rounds = 20 if quick else 200
    run(PYTHON, "bench/peers/all_reduce_vs_gloo.py", "--rounds", rounds, "--update-readme", readme)


def compare(readme, quick):
    """Beside MPI: three runs put together, each with its own groups."""
    few = ["--bytes", "8,64k,1m"] if quick else []
    operations = "all-reduce,reduce-scatter,all-gather,broadcast,reduce,all-to-all,gather,scatter"
    runs = [
        ["--ranks", "2", "--wires", "shm", "--operations", operations, "--bytes", "8,4k,64k,1m,16m,64m"],
        ["--ranks", "4", "--wires", "shm", "--operations", "all-reduce", "--bytes", "8,4k,64k,1m"],
        ["--ranks", "2", "--wires", "tcp", "--operations", "all-reduce", "--bytes", "8,4k,64k,1m,16m,64m"],
    ]
    if quick:
        runs = [[*flags[: flags.index("--bytes")], *few] for flags in runs]
    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder) / "rows.jsonl"
        said = (run(BENCH, "compare", "--layers", "native", *flags, "--json") for flags in runs)
        rows.write_text("".join(said), encoding="utf-8")
        run(BENCH, "compare", "--from", rows, "--update-readme", readme)


def servers(readme, quick):
    rounds = ["--rounds", "50"] if quick else []
    lines = {}
    for row in rows_of(BENCH, "ps", "--against", "echo", *rounds):
        cell = f"{row['p50_us']:,.0f} µs, {row['goodput_gb_per_s']:.2f} GB/s, {row['of_against']:.2f}"
        lines.setdefault(row["bytes"], {})[row["operation"]] = cell
    operations = ["push", "pull", "push_pull"]
    body = (
        f"Parameter server, one worker and one server that sums, float32 over loopback TCP: median of a call, goodput, and how "
        f"many times that of a plain TCP echo of the same message in the same run. {machine()}.\n\n"
    )
    cells = [[size_of(nbytes), *(line.get(operation, "–") for operation in operations)] for nbytes, line in lines.items()]
    write(readme, "servers", body + table(["bytes", *operations], cells))


def kernels(readme, quick):
    rounds = ["--rounds", "3"] if quick else []
    lines = {}
    for row in rows_of(BENCH, "memory", *rounds):
        cell = f"{row['gb_per_s']:.0f} GB/s" + ("" if row["of_limit"] == 1.0 else f", {row['of_limit']:.2f}")
        lines.setdefault(row["bytes"], {})[f"{row['kernel']} {row['dtype']}"] = cell
    wanted = [("copy", "copy bytes"), ("triad", "triad float32")]
    wanted += [("sum of float32", "sum-f32 float32"), ("sum of bfloat16", "sum-bf16 bfloat16")]
    body = (
        f"Sums, one thread: bytes read and written a second, and the share of a plain triad's in the same run. {machine()}.\n\n"
    )
    cells = [[size_of(nbytes), *(line[key] for _, key in wanted)] for nbytes, line in lines.items()]
    write(readme, "kernels", body + table(["bytes of each operand", *(name for name, _ in wanted)], cells))


def many_to_one(readme, quick):
    senders = ["--senders", "2,16" if quick else "2,4,8,16,32,64", "--seconds", "1" if quick else "3", "--source", "64m"]
    lines = {}
    for wire, ways in [("tcp", "none,credit,plain"), ("shm", "none")]:
        for row in rows_of(BENCH, "many-to-one", "--wire", wire, "--cc", ways, *senders):
            cell = f"{row['goodput_gb_per_s']:.2f} GB/s, {row['jain']:.3f}, {row['p99_us'] / 1e3:,.1f} ms"
            lines.setdefault(row["senders"], {})[f"{wire} {row['cc']}"] = cell
    wanted = [("TCP", "tcp none"), ("TCP, credit", "tcp credit"), ("plain sockets", "tcp plain"), ("shared memory", "shm none")]
    body = (
        "Many to one over loopback, pushes of 256 KiB, four under way a sender, from 64 MiB of all senders together: goodput of all, "
        f"Jain's index, 99th percentile of a push. Plain sockets are one reading thread without this library. {machine()}.\n\n"
    )
    cells = [[str(count), *(line.get(key, "–") for _, key in wanted)] for count, line in sorted(lines.items())]
    write(readme, "many-to-one", body + table(["senders", *(name for name, _ in wanted)], cells))


def write(readme, name, body):
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), name, body), encoding="utf-8")


STEPS = {
    "all-reduce": all_reduce,
    "compare": compare,
    "servers": servers,
    "kernels": kernels,
    "many-to-one": many_to_one,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps alone")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md", help="the file to write into")
    options = parser.parse_args(arguments)
    if not BENCH.exists() or not PYTHON.exists():
        raise SystemExit("run scripts/setup first: there is no release build of gradwire-bench, or no .venv")
    if os.getloadavg()[0] > 1:
        print(f"the load is {os.getloadavg()[0]:.2f}: figures will be those of a busy machine", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        draft = pathlib.Path(folder) / "README.md"
        shutil.copy(options.readme, draft)
        for number, name in enumerate(options.only, 1):
            began = time.monotonic()
            print(f"[{number}/{len(options.only)}] {name} ...", file=sys.stderr, flush=True)
            try:
                STEPS[name](draft, options.quick)
            except Failed as failed:
                raise SystemExit(f"{name}: {failed}; {options.readme} is as it was") from None
            print(f"[{number}/{len(options.only)}] {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        beside = options.readme.with_suffix(".new")
        shutil.copy(draft, beside)
        os.replace(beside, options.readme)
    print(f"{options.readme} has new figures: {', '.join(options.only)}")


if __name__ == "__main__":
    main()
