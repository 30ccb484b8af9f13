"""python -m bench.ablations NAME ...: ablations of the methods on real images; the runs go to bench/results/."""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time

import torch

from bench import machine
from bench.ablations import globalpru, paam, pruning, stability
from bench.ablations.tables import table
from bench.ablations.workshop import SCALES, Workshop
from paamops import cli

NAMES = {
    "mapping": pruning.mapping,
    "order": pruning.order,
    "criterion": pruning.criterion,
    "layer-aware": pruning.layer_aware,
    "rewinding": pruning.rewinding,
    "stability": stability.stability,
    "paam-criterion": paam.criterion,
    "paam-lambda": paam.penalties,
    "paam-attention": paam.scoring,
    "paam-gate": paam.gate,
    "paam-frozen": paam.frozen,
    "globalpru-beta": globalpru.betas,
    "globalpru-election": globalpru.election,
    "globalpru-rates": globalpru.rates,
}
METHODS = {"paam": paam.SCALES, "globalpru": globalpru.SCALES}
RESULTS = pathlib.Path(__file__).parents[1] / "results"


def main(arguments=None):
    """Run one ablation or all of them; they share the dense networks. Prints each table and writes each file."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shops = {}  # one for each scale
    for name in NAMES if "all" in options.names else dict.fromkeys(options.names):
        scale = METHODS.get(name.partition("-")[0], SCALES)[options.data]
        if options.seeds:
            scale = dataclasses.replace(scale, seeds=options.seeds)
        if scale not in shops:
            shops[scale] = Workshop(options.data, options.data_root, scale)
        shop = shops[scale]
        stored = measure(name, shop)
        print(f"{name}, {options.data}\n{table(stored)}", flush=True)
        path = pathlib.Path(options.out) / f"ablation-{name}-{options.data}.json"
        save(path, stored)
        print(f"wrote {path}\n", flush=True)
    return 0


def measure(name, shop):
    """The results of one ablation, as they are stored: machine, settings, every run."""
    start, cpu = time.perf_counter(), time.process_time()
    runs = list(NAMES[name](shop))
    facts = machine.facts("cpu") | {
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - cpu),
    }
    settings = {"data": shop.data, **dataclasses.asdict(shop.scale), "schedule": dataclasses.asdict(shop.schedule)}
    del settings["decays"]  # the schedule has them
    settings |= {"train": len(shop.dataset.train), "test": len(shop.dataset.test)}
    whole = shop.dense(0).channels.cost()
    settings |= {"params": whole.params, "flops": whole.flops, "filters": whole.filters}
    return _rounded({"ablation": name, "machine": facts, "settings": settings, "runs": runs})


def save(path, stored):
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump(stored))
    os.replace(temporary, path)


def dump(stored):
    """JSON with a line for each run."""
    runs = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in stored["runs"])
    head = "".join(
        f' "{key}": {json.dumps(value, ensure_ascii=False)},\n' for key, value in stored.items() if key != "runs"
    )
    return f'{{\n{head} "runs": [\n  {runs}\n ]\n}}\n'


def _rounded(value):
    """Floats of five places, small ones of three digits; lists in place of tuples.

    Accuracies are counts of a few thousand images; small are thresholds and rounding errors.
    """
    if isinstance(value, float):
        return round(value, 5) if abs(value) >= 1e-3 else float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=(*NAMES, "all"), help=", ".join((*NAMES, "all")))
    parser.add_argument("--data", choices=tuple(SCALES), default="fashion-mnist")
    parser.add_argument("--data-root", default="data", help="where the images are (digits need none)")
    parser.add_argument("--seeds", type=cli.positive, help="dense networks to start from (default: the data set's)")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads (default: torch's)")
    parser.add_argument("--out", default=RESULTS, help="folder for the results (default: bench/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
