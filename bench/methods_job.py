"""python -m bench.methods_job [--seeds 0 1 2] [--flops 0.3] [--methods …]: all methods at one size.

ResNet-20 on scikit-learn's digits. For each seed one network is trained; each method prunes that one to the same FLOPs,
a share of the unpruned network's, and trains as the command line has it. The norms' network is cut once, by the same
share in every layer, and then trained for as many epochs as three rounds of PAAM.
The test images are seen by the stored figures only. All of it is stored as it comes, beside what was there before: the
figures in bench/results/methods-job-SHARE-MACHINE.json, the networks in a folder of their own.
"""

import argparse
import copy
import datetime
import json
import os
import pathlib
import sys
import time

from paamops import cli, data, models, pruning, saving, training
from paamops.criteria import weight_scores
from paamops.methods.objective import Objective
from paamops.packing import pack
from paamops.selection import select
from paamops.tracing import trace

from . import machine
from .ablations import scores

RESULTS = pathlib.Path(__file__).parent / "results"
MODEL, DATA = "resnet20", "digits"
METHODS = {
    "dense": "unpruned",
    "aap": "AAP",
    "paam": "PAAM",
    "globalpru": "GlobalPru",
    "magnitude": "l1 norms of the filters, the same share of every layer, cut once",
}


def main(arguments=None):
    options = _parser().parse_args(arguments)
    path = pathlib.Path(options.results) / f"methods-job-{options.flops:g}-{machine.name('cpu')}.json"
    stored = begin(path, options.flops)
    for seed in options.seeds:
        for name, run, model in runs(seed, options.flops, options.methods):
            keep(pathlib.Path(options.networks) / f"{name}-{seed}.safetensors", model)
            print(f"seed {seed}, {name}: {run}", flush=True)
            stored["seeds"].setdefault(str(seed), {})[name] = run
            stored["seeds"] = dict(sorted(stored["seeds"].items(), key=lambda item: int(item[0])))
            write(path, stored)  # each as it comes
    return 0


def begin(path, flops):
    """What the file holds of the same job on this machine, or a new one."""
    facts = machine.facts("cpu") | {"date": datetime.date.today().isoformat()}
    stored = {
        "machine": facts,
        "command": f"python -m bench.methods_job --flops {flops:g}",
        "flops": flops,
        "methods": METHODS,
    }
    held = json.loads(path.read_text()) if path.exists() else {}
    same = held.get("flops") == flops and held["machine"] | {"date": None} == facts | {"date": None}
    return stored | {"seeds": held["seeds"] if same else {}}


def runs(seed, share, methods):
    """(name, what came of it, the network) for that of one seed and each method on it; a generator."""
    fabric, dataset = training.make_fabric("cpu"), data.load(DATA)
    defaults = cli.DIGITS_PAAM
    plan = pruning.Plan(
        schedule=cli.digits_schedule(training.schedule_for(MODEL)),
        epochs=defaults["epochs"],
        finetune_epochs=0,
        batch_size=defaults["batch_size"],
        seed=seed,
    )
    fabric.seed_everything(seed, verbose=False)
    dense = models.build(MODEL, in_channels=dataset.shape[0], num_classes=dataset.num_classes)
    start = time.perf_counter()
    training.train(
        dense,
        dataset,
        fabric,
        plan.schedule,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        seed=seed,
        quiet=True,
    )
    yield "dense", measured(dense, dataset, plan.epochs, time.perf_counter() - start), dense
    flops = int(share * trace(dense, dataset.normalise(dataset.test.images[:1])).cost().flops)
    for name in methods:
        start = time.perf_counter()
        small, spent = PRUNED_BY[name](copy.deepcopy(dense), dataset, fabric, plan, flops)
        yield name, measured(small, dataset, spent, time.perf_counter() - start), small


def with_paam(model, dataset, fabric, plan, flops):
    """(The network that PAAM leaves, the epochs that it trained)."""
    rewind = cli.DIGITS_PAAM["rewind"]
    learn = max(1, round(cli.PAAM_LEARN * plan.epochs))
    settings = {"trained": True, "rewind": rewind, "learn": learn}
    result = pruning.prune_by_scores(model, dataset, fabric, plan, {"flops": flops}, quiet=True, **settings)
    rounds = len(result.history) - 1
    return result.model, (rounds + result.stable) * learn + rounds * later(plan, rewind)


def with_aap(model, dataset, fabric, plan, flops):
    rewind = cli.DIGITS_AAP["rewind"]
    settings = {"trained": True, "rewind": rewind}
    result = pruning.prune_to_target(model, dataset, fabric, plan, Objective(flops=flops), quiet=True, **settings)
    return result.model, later(plan, rewind) * sum(each.accuracy is not None for each in result.history[1:])


def with_globalpru(model, dataset, fabric, plan, flops):
    rewind = cli.DIGITS_GLOBALPRU["rewind"]
    settings = {"trained": True, "rewind": rewind}
    result = pruning.prune_by_ranking(model, dataset, fabric, plan, {"flops": flops}, quiet=True, **settings)
    return result.model, plan.epochs + 2 * later(plan, rewind)  # warm-up, learning to rank, fine-tuning


def with_norms(model, dataset, fabric, plan, flops):
    """Cut once, by the l1 norms of the filters in equal shares of all layers; trained for the last of a schedule."""
    channels = trace(model, dataset.normalise(dataset.train.images[:1]))
    norms = scores.in_shares(channels, weight_scores(model, channels, "l1"))
    small = pack(model, channels, select(channels, norms, flops=flops))
    rewind = cli.DIGITS_PAAM["rewind"]
    epochs = 3 * (max(1, round(cli.PAAM_LEARN * plan.epochs)) + later(plan, rewind))  # three rounds of PAAM
    training.train(
        small,
        dataset,
        fabric,
        plan.schedule,
        epochs=epochs,
        start_epoch=round(epochs / (1 - rewind)) - epochs,
        batch_size=plan.batch_size,
        seed=plan.seed,
        quiet=True,
    )
    return small, epochs


def later(plan, rewind):
    """The epochs of the schedule that a method trains again after pruning."""
    return plan.epochs - round(rewind * plan.epochs)


PRUNED_BY = {"aap": with_aap, "paam": with_paam, "globalpru": with_globalpru, "magnitude": with_norms}


def measured(model, dataset, epochs, seconds):
    cost = trace(model, dataset.normalise(dataset.test.images[:1])).cost()
    return {
        "accuracy": round(100 * training.accuracy(model, dataset, dataset.test), 2),
        "params": cost.params,
        "flops": cost.flops,
        "epochs": epochs,
        "seconds": round(seconds),
    }


def keep(path, model):
    path.parent.mkdir(parents=True, exist_ok=True)
    saving.save(model, path)


def write(path, stored):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods_job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flops", type=float, default=0.3, help="the share of the unpruned network's that stays")
    parser.add_argument("--methods", nargs="+", choices=list(PRUNED_BY), default=list(PRUNED_BY))
    parser.add_argument("--networks", default="runs/methods-job", help="the folder that the networks are kept in")
    parser.add_argument("--results", default=RESULTS, help="the folder of the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
