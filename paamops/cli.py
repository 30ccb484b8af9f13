"""The command line: `python -m paamops prune | explain | info`."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from pathlib import Path

from paamops import data, models

EXAMPLES = """\
examples:
  python -m paamops prune
      train ResNet-20 on scikit-learn's digits, remove half of its parameters, compare (a minute or two)
  python -m paamops prune --model resnet56 --data cifar10 --data-root ~/data --flops 0.4 --device cuda
      keep 40 % of the FLOPs of ResNet-56 on CIFAR-10
  python -m paamops prune --model mynet:build --epochs 0 --data folder --data-root photos
      prune and fine-tune a trained network of your own: build() in mynet.py returns it with its weights
  python -m paamops explain --model vgg16 --data cifar10
      which filters can be removed, which cannot, and why
  python -m paamops info
      what was built, and which kernels serve which device
"""

# The digits are few and easy: fewer epochs and images a step than the papers' schedules have.
DIGITS = {"epochs": 12, "finetune_epochs": 8, "batch_size": 64}


def main(argv=None):
    """Run one command; the exit code: 0, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("paamops: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"paamops: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def parser():
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="python -m paamops",
        description="Make a convolutional network smaller and faster by removing whole filters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(required=True, metavar="command")
    add_prune(commands)
    add_explain(commands)
    info = command(commands, "info", "say what was built, and which kernels serve which device", run_info)
    info.set_defaults(debug=False)
    return top


def command(commands, name, help, run):
    new = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    new.set_defaults(run=run)
    return new


def add_prune(commands):
    new = command(commands, "prune", "train a network, remove its least active filters, fine-tune, compare", run_prune)
    add_subject(new)
    budget = new.add_argument_group(
        "what to keep", "One of these: a fraction such as 0.5, or a whole number. Default: --params 0.5."
    ).add_mutually_exclusive_group()
    budget.add_argument("--params", type=amount, metavar="KEEP", help="parameters to keep")
    budget.add_argument("--flops", type=amount, metavar="KEEP", help="FLOPs to keep")
    budget.add_argument("--filters", type=amount, metavar="KEEP", help="filters to keep")
    how = new.add_argument_group("how")
    how.add_argument("--epochs", type=count, metavar="N", help="training before pruning (digits: 12; else the paper's)")
    how.add_argument("--finetune-epochs", type=count, metavar="N", help="training after it (digits: 8; else half)")
    how.add_argument("--batch-size", type=positive, metavar="N", help="images a step (digits: 64; else the paper's)")
    how.add_argument("--seed", type=count, default=0, help="same seed, same result (default: 0)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    how.add_argument("--processes", type=positive, default=1, metavar="N", help="share every batch (default: 1)")
    how.add_argument(
        "--precision", choices=("32-true", "16-mixed", "bf16-mixed"), default="32-true", help="of training"
    )
    how.add_argument("--out", metavar="FILE", help="the packed model (default: runs/MODEL-DATA.safetensors)")
    how.add_argument("--quiet", action="store_true", help="print the final table only")
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_explain(commands):
    new = command(commands, "explain", "show which filters can be removed, which cannot, and why", run_explain)
    add_subject(new)
    new.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_subject(new):
    """Which network, and which images."""
    subject = new.add_argument_group("network and images")
    subject.add_argument(
        "--model",
        metavar="NAME",
        help="lenet5, resnet20, -32, -44, -56, -110, vgg16, or package.module:function that builds yours"
        " (default: resnet20)",
    )
    subject.add_argument("--weights", metavar="FILE", help="start from this file of paamops.save; --epochs is then 0")
    subject.add_argument(
        "--data",
        choices=data.NAMES,
        default="digits",
        help="default: digits, which needs no download; folder: your own images, --data-root/class/*.png",
    )
    subject.add_argument("--data-root", default="data", metavar="DIR", help="where the images are (default: data)")


def amount(text):
    """A fraction (0.5) or a whole number (100000)."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction in (0, 1] nor a whole number") from None
        return value


def count(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def run_prune(args):
    from paamops import pruning, training
    from paamops.saving import save

    name = model_name(args)
    out = Path(args.out or f"runs/{name}-{args.data}.safetensors")
    check_writable(out)
    fabric = training.make_fabric(args.device, args.precision, args.processes)
    for logger in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)  # not how the processes find each other
    fabric.launch()
    fabric.seed_everything(args.seed, verbose=False)
    leads = fabric.is_global_zero
    say = print if leads and not args.quiet else ignore

    dataset = data.load(args.data, args.data_root)
    model = find_model(args, dataset.shape, dataset.num_classes)
    plan = make_plan(args, name)
    sizes = ", ".join(f"{len(getattr(dataset, split))} {split}" for split in ("train", "validation", "test"))
    say(f"{name} on {args.data} ({sizes} images), {fabric.device}, seed {args.seed}")
    budget = {key: getattr(args, key) for key in ("params", "flops", "filters") if getattr(args, key) is not None}
    small, _ = pruning.prune(model, dataset, fabric, plan, budget or {"params": 0.5}, say, args.quiet or not leads)
    if leads:
        rows = pruning.report(model, small, dataset.to(fabric.device))
        save(small, out)
        print(pruning.table(rows))
        say(f"saved to {out}")
    fabric.barrier()


def run_explain(args):
    import torch

    from paamops.tracing import trace

    shape, num_classes = data.describe(args.data, args.data_root)
    print(trace(find_model(args, shape, num_classes), torch.zeros(1, *shape)).explain())


def run_info(args):
    from paamops.ops.registration import build_info

    for key, value in build_info().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for inner, what in value.items():
                print(f"  {inner}: {', '.join(map(' '.join, what.items())) if isinstance(what, dict) else what}")
        else:
            print(f"{key}: {value}")


def make_plan(args, name):
    """The papers' schedule, but for what the command line or the digits say."""
    from paamops.pruning import Plan
    from paamops.training import schedule_for

    schedule = schedule_for(name)
    defaults = {"epochs": schedule.epochs, "finetune_epochs": schedule.epochs // 2, "batch_size": schedule.batch_size}
    if args.data == "digits":
        defaults = DIGITS
    if args.weights:
        defaults = {**defaults, "epochs": 0}
    chosen = {key: default if getattr(args, key) is None else getattr(args, key) for key, default in defaults.items()}
    return Plan(schedule=schedule, seed=args.seed, **chosen)


def model_name(args):
    """A short name of the network: of the built-in one, of the user's function, or of the file it comes from."""
    if args.model is None and args.weights:
        return Path(args.weights).stem
    return (args.model or "resnet20").rpartition(":")[2]


def find_model(args, shape, num_classes):
    """The network that the command line names, for images of `shape` (c, h, w)."""
    from paamops.saving import load

    own = function(args.model) if args.model and ":" in args.model else None
    if args.weights:
        model = load(args.weights, own)
        recipe = getattr(model, "paamops_recipe", None) or {}
        if own is None and args.model not in (None, recipe["name"]):
            raise ValueError(f"{args.weights}: holds a {recipe['name']}, not a {args.model}")
        wanted = {"in_channels": shape[0], "num_classes": num_classes}
        for key, value in wanted.items():
            if recipe.get(key, value) != value:
                raise ValueError(f"{args.weights}: its {key} is {recipe[key]}; for {args.data} it must be {value}")
        return model
    if own:
        return own()
    return models.build(args.model or "resnet20", in_channels=shape[0], num_classes=num_classes)


def function(text):
    """The function that "package.module:function" names; modules in the current folder are found too."""
    module, _, name = text.rpartition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--model {text}: cannot import {module!r} ({error})") from error
    found = getattr(found, name, None)
    if not callable(found):
        raise ValueError(f"--model {text}: {module} has no function {name!r}")
    return found


def check_writable(path):
    """Know before an hour of training that the result can be stored."""
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder")
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: cannot write to {path.parent}")


def ignore(*_):
    pass
