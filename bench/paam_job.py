"""python -m bench.paam_job [--seeds 0 1 2] [--params 0.5]: PAAM, AAP and the filters' l1 norms at one size.

ResNet-20 on scikit-learn's digits. For each seed one network is trained; each method prunes that one to the same share
of its parameters and trains as the command line has it. The norms' network is packed once and then trained for as many
epochs as PAAM spends in all after the first training: learning scores and retraining, over all its rounds. The test
images are seen by the stored figures only. Stored after each seed, beside the seeds that were there before, in
bench/results/paam-job-SHARE-MACHINE.json.
"""

import argparse
import copy
import datetime
import json
import os
import pathlib
import sys
import time

import torch

from paamops import cli, data, models, pruning, training
from paamops.methods.objective import Objective
from paamops.packing import pack
from paamops.selection import select
from paamops.tracing import named_tensors, trace

from . import machine

RESULTS = pathlib.Path(__file__).parent / "results"
MODEL, DATA = "resnet20", "digits"
METHODS = {"dense": "unpruned", "paam": "PAAM", "aap": "AAP", "l1": "mean \\|w\\| of each filter, pruned once"}


def main(arguments=None):
    options = _parser().parse_args(arguments)
    path = pathlib.Path(options.results) / f"paam-job-{options.params:g}-{machine.name('cpu')}.json"
    stored = begin(path, options.params)
    for seed in options.seeds:
        runs = one_seed(seed, options.params)
        for name, run in runs.items():
            print(f"seed {seed}, {name}: {run}", flush=True)
        stored["seeds"][str(seed)] = runs
        stored["seeds"] = dict(sorted(stored["seeds"].items(), key=lambda item: int(item[0])))
        write(path, stored)  # each as it comes
    return 0


def begin(path, params):
    """What the file holds of the same job on this machine, or a new one."""
    facts = machine.facts("cpu") | {"date": datetime.date.today().isoformat()}
    stored = {
        "machine": facts,
        "command": f"python -m bench.paam_job --params {params:g}",
        "params": params,
        "methods": METHODS,
    }
    held = json.loads(path.read_text()) if path.exists() else {}
    same = held.get("params") == params and held["machine"] | {"date": None} == facts | {"date": None}
    return stored | {"seeds": held["seeds"] if same else {}}


def one_seed(seed, params):
    """name -> what came of the network and of each method on it, under one seed."""
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
    runs = {"dense": measured(dense, dataset, plan.epochs, time.perf_counter() - start)}
    epochs = None
    for name, method in (("paam", with_paam), ("aap", with_aap), ("l1", with_norms)):
        start = time.perf_counter()
        small, spent = method(copy.deepcopy(dense), dataset, fabric, plan, params, epochs)
        epochs = epochs or spent  # PAAM's are the norms' too
        runs[name] = measured(small, dataset, spent, time.perf_counter() - start)
    return runs


def with_paam(model, dataset, fabric, plan, params, _):
    """(The network that PAAM leaves, the epochs that it trained)."""
    rewind = cli.DIGITS_PAAM["rewind"]
    learn = max(1, round(0.3 * plan.epochs))
    result = pruning.prune_by_scores(
        model,
        dataset,
        fabric,
        plan,
        {"params": params},
        quiet=True,
        trained=True,
        rewind=rewind,
        learn=learn,
    )
    rounds = len(result.history) - 1
    return result.model, (rounds + result.stable) * learn + rounds * (plan.epochs - round(rewind * plan.epochs))


def with_aap(model, dataset, fabric, plan, params, _):
    rewind = cli.DIGITS_AAP["rewind"]
    result = pruning.prune_to_target(
        model, dataset, fabric, plan, Objective(params=params), quiet=True, trained=True, rewind=rewind
    )
    rounds = sum(each.accuracy is not None for each in result.history[1:])
    return result.model, rounds * (plan.epochs - round(rewind * plan.epochs))


def with_norms(model, dataset, fabric, plan, params, epochs):
    """Pruned once, by the mean size of each filter's weights; trained for the last of a schedule, as PAAM's rounds."""
    channels = trace(model, dataset.normalise(dataset.train.images[:1]))
    small = pack(model, channels, select(channels, norms(model, channels), params=params))
    total = round(epochs / (1 - cli.DIGITS_PAAM["rewind"]))
    training.train(
        small,
        dataset,
        fabric,
        plan.schedule,
        epochs=epochs,
        start_epoch=total - epochs,
        batch_size=plan.batch_size,
        seed=plan.seed,
        quiet=True,
    )
    return small, epochs


@torch.no_grad()
def norms(model, channels):
    """(F,) mean |w| of each filter; the mean, so that the size of a layer's filters does not decide."""
    tensors = named_tensors(model)
    return torch.cat(
        [tensors[layer.weight].detach().abs().movedim(layer.axis, 0).flatten(1).mean(1) for layer in channels.layers]
    ).float()


def measured(model, dataset, epochs, seconds):
    cost = trace(model, dataset.normalise(dataset.test.images[:1])).cost()
    return {
        "accuracy": round(100 * training.accuracy(model, dataset, dataset.test), 2),
        "params": cost.params,
        "flops": cost.flops,
        "epochs": epochs,
        "seconds": round(seconds),
    }


def write(path, stored):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.paam_job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--params", type=float, default=0.5, help="the share of the parameters that stays")
    parser.add_argument("--results", default=RESULTS, help="the folder of the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
