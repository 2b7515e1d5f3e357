"""Trains one network three ways, and shows that all three give the same.

    scripts/demo                        2 workers, 12 epochs: about a minute
    scripts/demo --workers 3 --epochs 5

1. One process alone: what the other two must come out at.
2. Workers with DistributedDataParallel over gradwire's all-reduce.
3. Workers with their optimizer on two `gradwire-ps` servers.

Prints a table and writes a picture of the loss curves to out/demo.png. Exits with 1 where an accuracy is below 95 % or
a weight is not that of one process.
"""

import argparse
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: Sums of the same doubles in another order, carried through some hundred steps: the largest difference of any weight that
#: is no mistake.
TOLERANCE = 1e-6
NEEDED = 0.95


def train(model, optimizer, data, arguments, rank, size, report):
    """The one training loop; `report` gets the mean loss of each epoch over this rank's share."""
    import torch

    images, labels, test_images, test_labels = data
    loss_of = torch.nn.CrossEntropyLoss()
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        losses = []
        for start in range(0, len(order) - arguments.batch + 1, arguments.batch):
            mine = order[start : start + arguments.batch][rank::size]
            optimizer.zero_grad()
            loss = loss_of(model(images[mine]), labels[mine])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        report(epoch=epoch + 1, loss=sum(losses) / len(losses), accuracy=accuracy)


def work(arguments):
    """A worker process: one JSON line an epoch, one at the end."""
    sys.path.insert(0, str(ROOT / "python" / "examples"))
    import torch
    from ddp_digits import digits, network

    torch.set_num_threads(1)
    # In double precision, rounding stays too small to be mistaken for a mistake, however long the training.
    torch.set_default_dtype(torch.float64)
    rank, size, mode = arguments.rank, arguments.workers, arguments.mode
    images, labels, test_images, test_labels = digits()
    model, data = network(), (images.double(), labels, test_images.double(), test_labels)
    began = time.monotonic()

    def report(**fields):
        print(json.dumps(fields), flush=True)

    make = lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # noqa: E731
    if mode == "alone":
        train(model, make(model.parameters()), data, arguments, 0, 1, report)
        wire, moved = "none", 0
    elif mode == "all-reduce":
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        # No import of gradwire: torch finds the backend by its name.
        dist.init_process_group("gradwire", init_method=f"file://{arguments.store}", rank=rank, world_size=size)
        ddp = DistributedDataParallel(model)
        train(ddp, make(ddp.parameters()), data, arguments, rank, size, report)
        described = dist.group.WORLD._get_backend(torch.device("cpu")).describe()
        moved = described.segment_bytes + sum(link.sent_bytes for link in described.links)
        wire = described.links[0].wire if described.links else "none"
        dist.destroy_process_group()
    else:
        import gradwire
        from gradwire.torch import DistributedOptimizer

        with gradwire.connect(arguments.servers, token=arguments.token, rank=rank) as client:
            optimizer = DistributedOptimizer(make(model.parameters()), client, workers=size)
            train(model, optimizer, data, arguments, rank, size, report)
            mine = [client_of for shard in client.status() for client_of in shard["clients"] if client_of["client"] == rank]
            moved = sum(entry["received_bytes"] + entry["sent_bytes"] for entry in mine)
            wire = "tcp"
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save(weights, arguments.weights)
    report(end=True, seconds=time.monotonic() - began, wire=wire, moved=moved)


class Progress:
    """One line that moves on a terminal; one line an epoch elsewhere."""

    def __init__(self, title, epochs):
        self.title, self.epochs, self.live = title, epochs, sys.stdout.isatty()

    def show(self, epoch, loss, accuracy):
        done = round(24 * epoch / self.epochs)
        line = f"{self.title:24} [{'#' * done:24}] epoch {epoch:2}/{self.epochs}  loss {loss:.4f}  held-out {accuracy:.1%}"
        if self.live:
            print("\r" + line, end="" if epoch < self.epochs else "\n", flush=True)
        elif epoch in (1, self.epochs):
            print(line, flush=True)


def run(title, arguments, mode, size, folder, **extra):
    """Runs `size` workers of a mode; what rank 0 reported, and everybody's weights."""
    import torch

    weights = [folder / f"{mode}-{rank}.pt" for rank in range(size)]
    command = [sys.executable, __file__, "--mode", mode, "--epochs", str(arguments.epochs), "--batch", str(arguments.batch)]
    command += ["--workers", str(size)] + [part for key, value in extra.items() for part in (f"--{key}", str(value))]
    workers = []
    try:
        for rank in range(size):
            each = [*command, "--rank", str(rank), "--weights", str(weights[rank])]
            workers.append(subprocess.Popen(each, stdout=subprocess.PIPE, text=True))
        progress, curve, last = Progress(title, arguments.epochs), [], {}
        for line in workers[0].stdout:
            last = json.loads(line)
            if "epoch" in last:
                curve.append(last)
                progress.show(**last)
        for worker in workers[1:]:
            # Every rank tells the loss of its share; the batch's is their mean.
            for point, line in zip(curve, worker.stdout, strict=False):
                point["loss"] += json.loads(line).get("loss", 0)
        for point in curve:
            point["loss"] /= size
        codes = [worker.wait(timeout=60) for worker in workers]
        if any(codes) or "end" not in last:
            sys.exit(f"{title}: workers ended with {codes}")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
    return {"title": title, "curve": curve, **last, "weights": [torch.load(path) for path in weights]}


def serve(shards, token):
    """Starts `gradwire-ps` with two shards; the process and its addresses."""
    binary = ROOT / "target" / "release" / "gradwire-ps"
    server = subprocess.Popen(
        [binary, "serve", "--listen", "127.0.0.1:0", "--shards", str(shards), "--log", "warn"],
        env={**os.environ, "GRADWIRE_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    )
    addresses = []
    while len(addresses) < shards:
        line = server.stdout.readline()
        if not line:
            sys.exit("gradwire-ps ended before it served")
        found = re.search(r"127\.0\.0\.1:\d+", line)
        if found:
            addresses.append(found[0])
    return server, ",".join(addresses)


def table(rows):
    """The rows under their head, as text."""
    head = ("", "loss", "held-out", "seconds", "wire", "GB moved", "weights off by", "ranks equal")
    cells = [head]
    for row in rows:
        last = row["curve"][-1]
        gap = "" if row["gap"] is None else f"{row['gap']:.1e}"
        equal = "" if row["equal"] is None else ("to the bit" if row["equal"] else "NO")
        cells.append((row["title"], f"{last['loss']:.4f}", f"{last['accuracy']:.1%}", f"{row['seconds']:.1f}", row["wire"],
                      f"{row['moved'] / 1e9:.3f}", gap, equal))  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def picture(rows, path):
    """Loss against epoch, one curve a way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for row, style in zip(rows, ("-", "--", ":"), strict=True):
        epochs = [point["epoch"] for point in row["curve"]]
        axes.plot(epochs, [point["loss"] for point in row["curve"]], style, label=row["title"], linewidth=2.2)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log", title="One network, three ways: handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="workers of the second and third way (default 2)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images (default 12)")
    parser.add_argument("--batch", type=int, default=64, help="images per step over all workers (default 64)")
    for hidden in ("mode", "store", "servers", "token", "weights"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.batch % arguments.workers:
        parser.error("--batch must be a multiple of --workers, so that all shares are equal")
    if arguments.mode:
        return work(arguments)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rows = [run("one process", arguments, "alone", 1, folder)]
        store = folder / "store"
        rows.append(run("all-reduce (DDP)", arguments, "all-reduce", arguments.workers, folder, store=store))
        token = secrets.token_hex(16)
        server, addresses = serve(2, token)
        try:
            extra = {"servers": addresses, "token": token}
            rows.append(run("parameter server", arguments, "server", arguments.workers, folder, **extra))
        finally:
            server.terminate()
            server.wait(timeout=10)
    return judge(rows, ROOT / "out" / "demo.png")


def judge(rows, path):
    """Prints the table and the verdict, and draws; the exit code."""
    alone = rows[0]
    for row in rows:
        # A rank's loss is over its share; the weights are what must agree, and the losses of equal weights do.
        row["equal"] = None if row is alone else all(bool((w == row["weights"][0]).all()) for w in row["weights"])
        row["gap"] = None if row is alone else (row["weights"][0] - alone["weights"][0]).abs().max().item()
    picture(rows, path)
    print("\n" + table(rows) + "\n")
    worst = max(row["gap"] for row in rows[1:])
    accuracies = [row["curve"][-1]["accuracy"] for row in rows]
    print(f"largest difference of any weight from one process's: {worst:.1e} (at most {TOLERANCE:.0e} is rounding)")
    print(f"the loss curves are in {path.relative_to(ROOT)}")
    flaws = []
    if min(accuracies) < NEEDED:
        flaws.append(f"a held-out accuracy is below {NEEDED:.0%}")
    if worst > TOLERANCE:
        flaws.append("the weights differ by more than rounding")
    if not all(row["equal"] for row in rows[1:]):
        flaws.append("ranks ended with different weights")
    print("FAILED: " + "; ".join(flaws) if flaws else "all three agree")
    return 1 if flaws else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
