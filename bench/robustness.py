"""python -m bench.robustness [NAME=FILE ...]: accuracy of pruned networks and of dense ones under attack.

GlobalPru's test of robustness (Wang et al. 2023, §4.4) in our form: accuracy on the test images, and on the same images
after FGSM and PGD have changed them by at most eps a pixel, pixels in [0, 1]. Each network is attacked by its own
gradient.

    python -m bench.robustness dense=a.safetensors aap=b.safetensors --data cifar10

The files are those that paamops has stored; `python -m bench.methods_job` leaves its networks in runs/methods-job. A
name that is given several times is one network under several seeds: its first file counts as seed 0, and so on. Stored
in bench/results/robustness-DATA-MACHINE.json.
"""

import argparse
import datetime
import pathlib
import sys

from bench import attacks, machine, methods_job
from bench.ablations.spread import deviation, mean
from paamops import cli, data, pruning, saving, training
from paamops.methods.hessian import left_alone
from paamops.tracing import trace

RESULTS = methods_job.RESULTS
EPS = (0.02, 0.05, 0.1)
STEPS = 10  # of PGD
BATCH = 256  # images at a time


def main(arguments=None):
    options = _parser().parse_args(arguments)
    dataset = data.load(options.data, options.data_root)
    named = list(stored_networks(options.files, dataset))
    facts = machine.facts("cpu") | {"date": datetime.date.today().isoformat()}
    settings = {"data": dataset.name, "images": len(dataset.test), "eps": options.eps, "steps": options.steps}
    stored = {"machine": facts, "attacks": settings, "titles": methods_job.METHODS, "seeds": {}}
    for seed, name, model in named:
        run = measured(model, dataset, options.eps, options.steps)
        print(f"seed {seed}, {name}: {run}", flush=True)
        stored["seeds"].setdefault(str(seed), {})[name] = run
    methods_job.write(pathlib.Path(options.results) / f"robustness-{options.data}-{machine.name('cpu')}.json", stored)
    print(table(stored))
    return 0


def stored_networks(files, dataset):
    """(seed, name, model) for each of the pairs (name, file); a generator. All are looked at before the first comes."""
    seeds, found = {}, []
    for name, path in files:
        model = saving.load(path)
        try:
            pruning.check_output(model, dataset)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: is no network for {dataset.name} ({error})") from error
        seeds[name] = seeds.get(name, -1) + 1
        found.append((seeds[name], name, model))
    yield from found


def measured(model, dataset, eps=EPS, steps=STEPS):
    """What is stored of a network: its size and its accuracies in per cent, under attack one for each of `eps`."""
    size = cost(model, dataset)
    with left_alone(model):
        clean = training.accuracy(model, dataset, dataset.test)
    kinds = {"fgsm": lambda *batch, number: attacks.fgsm(*batch)}
    kinds["pgd"] = lambda *batch, number: attacks.pgd(*batch, steps=steps, seed=number)
    found = {name: [attacked(model, dataset, attack, each) for each in eps] for name, attack in kinds.items()}
    run = {"params": size.params, "flops": size.flops, "clean": round(100 * clean, 2)}
    return run | {name: [round(100 * share, 2) for share in shares] for name, shares in found.items()}


def attacked(model, dataset, attack, eps):
    """The fraction of the test images that the model still classifies right, attacked by attack(..., number=batch)."""
    parameter, right = next(model.parameters()), 0

    def classify(images):
        return model(dataset.normalise(255 * images).to(parameter.device, parameter.dtype))

    with left_alone(model):
        parts = zip(dataset.test.images.split(BATCH), dataset.test.labels.split(BATCH), strict=True)
        for number, (images, labels) in enumerate(parts):
            found = attack(classify, images.float() / 255, labels, eps, number=number)
            right += int((classify(found).argmax(1) == labels).sum())
    return right / len(dataset.test)


def cost(model, dataset):
    return trace(model, dataset.normalise(dataset.test.images[:1])).cost()


def table(stored):
    """A Markdown table, a line for each network: mean and, over several seeds, standard deviation."""
    settings, facts, seeds = stored["attacks"], stored["machine"], stored["seeds"]
    shown = [f"{name}, eps {eps:g}" for name in ("FGSM", f"PGD-{settings['steps']}") for eps in settings["eps"]]
    head = ["FLOPs, millions", "clean", *shown]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in dict.fromkeys(name for runs in seeds.values() for name in runs):
        runs = [each[name] for each in seeds.values() if name in each]
        columns = zip(*([run["clean"], *run["fgsm"], *run["pgd"]] for run in runs), strict=True)
        cells = [_spread([run["flops"] / 1e6 for run in runs]), *map(_spread, columns)]
        lines.append(f"| {stored['titles'].get(name, name)} | {' | '.join(cells)} |")
    told = f"seeds {', '.join(seeds)}: mean ± standard deviation" if len(seeds) > 1 else f"seed {next(iter(seeds))}"
    lines += [
        "",
        f"Accuracy in per cent on {settings['images']:,} test images of {settings['data']}; eps of pixels in [0, 1].",
        f"`python -m bench.robustness`, {told}; {facts['device']}, {facts['threads']} CPU threads, torch"
        f" {facts['torch']}, {facts['date']}.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values):
    return f"{mean(values):.2f}" + (f" ± {deviation(values):.2f}" if len(values) > 1 else "")


def _pair(text):
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, path


def _eps(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=_pair, metavar="NAME=FILE", help="networks that paamops has stored")
    parser.add_argument("--data", choices=data.NAMES, default=methods_job.DATA, help="what the files were trained on")
    parser.add_argument("--data-root", default="data", help="the folder of the data")
    parser.add_argument("--eps", type=_eps, nargs="+", default=list(EPS), help="of pixels in [0, 1]")
    parser.add_argument("--steps", type=cli.positive, default=STEPS, help="of PGD")
    parser.add_argument("--results", default=RESULTS, help="the folder of the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
