"""python -m bench.peer_torch_pruning [--rounds 7] [--quick]: paamops beside torch-pruning, point by point.

Two tables, from one run on the CPU. "Right": what must hold of a pruner (`peer_rows.py`), tried on both. "Fast": the
same job by both, in turns; medians of wall time with garbage collection off, as `timeit` has it. torch-pruning is used
as its README says: `DependencyGraph().build_dependency`, or `BasePruner` with `GroupMagnitudeImportance(p=2)` and a
ratio of 0.30 of the channels, for half of the parameters; paamops is then asked for the parameters that it left.
The figures go to bench/results/peer-torch-pruning-MACHINE.json; README quotes them through `python -m bench.tables`.
"""

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import paamops
from tests.architectures import ARCHITECTURES

from . import machine, peer_rows

RESULTS = pathlib.Path(__file__).parent / "results"
RATIO = 0.3
# Network, side of the images, how many times faster it is to be than the dependency graph, than the pruner's
# construction, than that and `step()`, which is left out where nothing is asked: it would take minutes a time.
NETWORKS = (("resnet50", 224, 1, None, 3), ("densenet121", 64, None, 3, 15), ("densenet264", 64, None, 10, None))
DEPTHS = (100, 300, 1000)
PATIENCE = 60  # seconds that one measurement of growth may take


class Chain(nn.Module):
    """A residual network of `depth` convolutions with norms, all of one width."""

    def __init__(self, depth, width=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.outer = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for conv, norm in zip(self.inner, self.outer, strict=True):
            x = x + F.relu(norm(conv(x)))
        return self.last(x.mean((2, 3)))


def seconds(function):
    """(what it returns, the seconds it took)."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = function()
        return result, time.perf_counter() - start
    finally:
        gc.enable()


def construct(model, x):
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    scorer = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.BasePruner(model, x, importance=scorer, pruning_ratio=RATIO, ignored_layers=last)


def whole_job(model, x, params):
    channels = paamops.trace(model, x)
    return paamops.pack(model, channels, paamops.select(channels, peer_rows.l2(model, channels), params=params))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def in_turns(name, side, rounds, whole_jobs):
    """Name of a job -> its seconds, one of each round; with `whole_jobs`, the share of parameters that both leave."""
    import torch_pruning as tp

    model, x = ARCHITECTURES[name].make().eval(), torch.randn(1, 3, side, side)
    times = {job: [] for job in ("trace", "dependency graph", "construction")}
    left = None
    if whole_jobs:
        times |= {"whole job": [], "construction and step": []}
        pruned, whole = copy.deepcopy(model), parameters(model)
        construct(pruned, x).step()  # warms up, and says how many parameters to ask for
        target = parameters(pruned)
        small = whole_job(model, x, target)
        assert parameters(small) <= target
        left = {"asked": target / whole, "paamops": parameters(small) / whole, "torch-pruning": target / whole}
    for _ in range(rounds):
        times["trace"].append(seconds(lambda: paamops.trace(model, x))[1])
        times["dependency graph"].append(seconds(lambda: tp.DependencyGraph().build_dependency(model, x))[1])
        if whole_jobs:
            times["whole job"].append(seconds(lambda: whole_job(model, x, target))[1])
        other = copy.deepcopy(model)
        pruner, spent = seconds(lambda: construct(other, x))  # noqa: B023 (called at once)
        times["construction"].append(spent)
        if whole_jobs:
            times["construction and step"].append(spent + seconds(pruner.step)[1])
    return times, left


def fast(rounds, networks=NETWORKS):
    rows = []
    for name, side, graph, construction, job in networks:
        times, left = in_turns(name, side, rounds, whole_jobs=job is not None)
        medians = {each: 1e3 * statistics.median(values) for each, values in times.items()}
        where = f"{name}, {side}²"
        rows.append(row(f"{where}: trace | dependency graph", medians["trace"], medians["dependency graph"], graph))
        rows.append(row(f"{where}: trace | construction", medians["trace"], medians["construction"], construction))
        if job is not None:
            title = f"{where}: trace, l2, select and pack | construction and `step()`"
            rows.append(row(title, medians["whole job"], medians["construction and step"], job) | {"left": left})
        print(*rows[-3:], sep="\n", flush=True)
    return rows


def row(title, ours, theirs, target):
    met = None if target is None else theirs / ours >= target
    return {"title": title, "ours": ours, "theirs": theirs, "ratio": theirs / ours, "target": target, "met": met}


def growth(depths=DEPTHS):
    """Milliseconds for residual networks of more and more layers; None where the next would not end within PATIENCE."""
    rows, before = [], None
    for depth in depths:
        model, x = Chain(depth).eval(), torch.randn(1, 3, 8, 8)
        ours = min(seconds(lambda: whole_job(model, x, 0.5))[1] for _ in range(2))  # noqa: B023
        theirs = None
        if before is None or (before[1] is not None and before[1] * (depth / before[0]) ** 2 < PATIENCE):
            try:
                theirs = seconds(lambda: construct(model, x).step())[1]  # noqa: B023
            except Exception as error:
                print(f"torch-pruning at {depth} layers: {peer_rows.first_line(error)}")
        before = depth, theirs
        rows.append({"depth": depth, "ours": 1e3 * ours, "theirs": None if theirs is None else 1e3 * theirs})
        print(rows[-1], flush=True)
    return rows


PEAK = """
import copy, sys, threading, time
import torch
from torch import nn
from bench import peer_torch_pruning, peer_rows
import paamops

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.set_num_threads(1)
width = 1024
model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())))
model = nn.Sequential(nn.Conv2d(3, width, 1), *model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
model.eval()
x = torch.randn(1, 3, 2, 2)
small = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 10)).eval()
if sys.argv[1] == "paamops":
    peer_torch_pruning.whole_job(small, x, 0.6)  # what is imported at the first call
    channels = paamops.trace(model, x)
    keep = paamops.select(channels, peer_rows.l2(model, channels), params=0.5)
    job = lambda: paamops.pack(model, channels, keep)
else:
    peer_torch_pruning.construct(small, x).step()
    pruner = peer_torch_pruning.construct(model, x)
    job = pruner.step
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
result = job()
done = True
thread.join()
result = model if result is None else result
tensors = [t.nbytes for t in (*result.parameters(), *result.buffers())]
print(peak - before, sum(tensors), max(tensors))
"""


def memory():
    """Bytes above those before the call, at their peak, while 230 MB of weights are packed; the packed bytes."""
    found = {}
    for name in peer_rows.PRUNERS:
        command = [sys.executable, "-W", "ignore", "-c", PEAK, name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        peak, packed, largest = (int(word) for word in lines[-1].split())
        found[name] = {"peak": peak, "packed": packed, "largest": largest, "holds": peak <= packed + largest}
        print(name, found[name], flush=True)
    return found


def table(stored):
    """Markdown: what holds, what is faster, how it grows, what it takes."""
    say = {True: "holds", False: "**fails**"}
    lines = ["| what must hold | paamops | torch-pruning |", "|---|---|---|"]
    for title, found in stored["right"].items():
        cells = [f"{say[found[name]['holds']]}: {_cell(found[name]['seen'])}" for name in peer_rows_names(stored)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if stored["memory"]:
        title = "packing peaks at the packed size plus one tensor"
        cells = [
            f"{say[each['holds']]}: {each['peak'] / 2**20:.0f} MiB above the start; {each['packed'] / 2**20:.0f} MiB"
            f" packed, the largest tensor {each['largest'] / 2**20:.0f} MiB"
            for each in stored["memory"].values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| job | paamops, ms | torch-pruning, ms | times faster | aim |", "|---|---|---|---|---|"]
    for each in stored["fast"]:
        aim = "" if each["target"] is None else f"≥ {each['target']}, {'met' if each['met'] else '**not met**'}"
        where, jobs = each["title"].split(": ", 1)
        mine, theirs = jobs.split(" | ")
        cells = [f"{mine}: {each['ours']:.0f}", f"{theirs}: {each['theirs']:.0f}", f"{each['ratio']:.1f}", aim]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    for each in stored["growth"]:
        theirs = "more than a minute" if each["theirs"] is None else f"{each['theirs']:.0f}"
        ratio = "" if each["theirs"] is None else f"{each['theirs'] / each['ours']:.1f}"
        mine = f"{each['ours']:.0f} ({each['ours'] / each['depth']:.2f} a layer)"
        lines.append(f"| {each['depth']} residual layers, the whole job | {mine} | {theirs} | {ratio} | |")
    facts = stored["machine"]
    lines += [
        "",
        f"`{stored['command']}`: torch-pruning {stored['peer']['torch-pruning']}, paamops {stored['peer']['paamops']};"
        f" medians of {stored['rounds']} in turns; {facts['device']}, {facts['threads']} CPU threads, torch"
        f" {facts['torch']}, {facts['date']}.",
    ]
    return "\n".join(lines) + "\n"


def peer_rows_names(stored):
    return list(next(iter(stored["right"].values())))


def _cell(text):
    return text.replace("|", "\\|")


def main(arguments=None):
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        version = importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        print("torch-pruning is not installed: pip install torch-pruning==1.6.1")
        return 1
    torch.manual_seed(0)
    right = peer_rows.run()
    for title, found in right.items():
        print(title, *(f"  {name}: {each}" for name, each in found.items()), sep="\n", flush=True)
    rounds = 3 if options.quick else options.rounds
    stored = {
        "peer": {"paamops": paamops.__version__, "torch-pruning": version},
        "machine": machine.facts("cpu") | {"date": datetime.date.today().isoformat()},
        "command": "python -m bench.peer_torch_pruning" + " --quick" * options.quick,
        "rounds": rounds,
        "right": right,
        "fast": fast(rounds, NETWORKS[:2] if options.quick else NETWORKS),
        "growth": growth(DEPTHS[:1] if options.quick else DEPTHS),
        "memory": memory() if sys.platform == "linux" and not options.quick else {},
    }
    path = pathlib.Path(options.results) / f"peer-torch-pruning-{machine.name('cpu')}.json"
    write(path, stored)
    print(table(stored))
    return 0


def write(path, stored):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.peer_torch_pruning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each job runs")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no large networks, no memory: a first look")
    parser.add_argument("--results", default=RESULTS, help="the folder of the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
