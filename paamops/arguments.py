"""The arguments of the command line: what there is to say, and what is refused."""

import argparse
import functools
import os
import sys

from paamops import __version__, data, models
from paamops.criteria import CRITERIA
from paamops.methods.objective import MINIMISE

NOT_MET = 3  # the exit code

# What a method has no use for, by its name as an attribute.
ROUNDS = ("rewind", "rounds", "state", "report", "trained", "resume", "no_report", "compiled")
AAP_ONLY = ("max_accuracy_drop", "minimise", "rewind_weights")
PAAM_ONLY = ("learn", "lambda", "train_filters")
GLOBALPRU_ONLY = ("rate", "mode", "alpha", "beta", "curve")
ONCE_ONLY = ("criterion", "finetune_epochs")
UNUSED = {
    "once": (*AAP_ONLY, *PAAM_ONLY, *GLOBALPRU_ONLY, *ROUNDS),
    "aap": ("filters", *ONCE_ONLY, *PAAM_ONLY, *GLOBALPRU_ONLY),
    "paam": (*ONCE_ONLY, *AAP_ONLY, *GLOBALPRU_ONLY),
    "globalpru": ("filters", *ONCE_ONLY, "rounds", *AAP_ONLY, *PAAM_ONLY),
}

EXAMPLES = """\
examples:
  python -m paamops prune
      train ResNet-20 on scikit-learn's digits, remove half of its parameters, compare (a minute or two)
  python -m paamops prune --method aap --max-accuracy-drop 1.0
      the smallest ResNet-20 that loses at most one point of accuracy (a few minutes)
  python -m paamops prune --method paam --params 0.5
      half of the parameters, by scores that are learned from the filters while the network runs
  python -m paamops prune --method globalpru --rate 0.5
      half of the channels of each layer, by one ranking that all images elect and the network learns
  python -m paamops prune --method aap --model resnet56 --data cifar10 --data-root ~/data --flops 0.4 --device cuda
      --state runs/aap --resume
      keep 40 % of the FLOPs of ResNet-56 on CIFAR-10, in rounds; the same command goes on after an interruption
  python -m paamops prune --model mynet:build --epochs 0 --data folder --data-root photos
      prune and fine-tune a trained network of your own: build() in mynet.py returns it with its weights
  python -m paamops explain --model vgg16 --data cifar10
      which filters can be removed, which cannot, and why
  python -m paamops info
      what was built, and which kernels serve which device

exit codes: 0 done; 1 an error; 2 a wrong command line; 3 the target was not met, the best network found is saved;
  130 Ctrl-C
"""


def complain(message):
    """One line on stderr, from the first of the processes that share the work: the others fail with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"paamops: {' '.join(str(message).split())}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        complain(f"{message}; see {self.prog} --help")
        sys.exit(2)


def parser(prune, explain, info):
    """The argument parser; a command runs the function given for it."""
    top = Parser(
        prog="python -m paamops",
        description="Make a convolutional network smaller and faster by removing whole filters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"paamops {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    add_prune(commands, prune)
    add_subject(command(commands, "explain", "show which filters can be removed, which cannot, and why", explain))
    command(commands, "info", "say what was built, and which kernels serve which device", info)
    return top


def command(commands, name, help, run):
    new = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    new.add_argument("--debug", action="store_true", help="show the traceback of an error")
    new.set_defaults(run=run, error=new.error)
    return new


def add_prune(commands, run):
    new = command(
        commands, "prune", "train a network, remove its least useful filters, train what is left, compare", run
    )
    new.epilog = f"Exit code {NOT_MET}: the target was not met; the best network that was found is saved all the same."
    add_subject(new)
    new.add_argument(
        "--method",
        choices=("once", "aap", "paam", "globalpru"),
        default="once",
        help="once: score the filters, by --criterion, prune and fine-tune once; aap: automatic attention pruning,"
        " round by round to the target; paam: learn the scores while the network runs, prune to the budget, retrain,"
        " until the same filters stay; globalpru: put squeeze-and-excitations into the network, let all images elect a"
        " ranking of each layer's channels, teach it, remove the lowest, fine-tune (default: once)",
    )
    budget = new.add_argument_group(
        "what to keep",
        "A fraction such as 0.5, or a whole number. Once and PAAM: one of these, by default --params 0.5. AAP:"
        " --params, --flops or both, --max-accuracy-drop, or all; by default --max-accuracy-drop 1.0. GlobalPru:"
        " --params, --flops or --rate; by default --rate 0.5.",
    )
    budget.add_argument("--params", type=amount, metavar="KEEP", help="parameters to keep")
    budget.add_argument("--flops", type=amount, metavar="KEEP", help="FLOPs to keep")
    budget.add_argument("--filters", type=amount, metavar="KEEP", help="filters to keep (once and PAAM)")
    budget.add_argument("--rate", type=inside, metavar="SHARE", help="GlobalPru: of each layer's channels, to remove")
    budget.add_argument(
        "--max-accuracy-drop",
        type=points,
        metavar="POINTS",
        help="AAP: percentage points of accuracy to lose, on validation images. With --data digits, which has few of"
        " them, rounds may lose half of it only: the rest is kept back, so that it is likelier to hold for other images"
        " too",
    )
    new.add_argument_group("once only").add_argument(
        "--criterion",
        choices=("attention", *CRITERIA),
        help="what filters are scored by: the attention of their activations; or their weights' l1 or l2 norm, distance"
        " from the other filters of the layer, or batch-norm scale; or at random (default: attention)",
    )
    add_rounds(new.add_argument_group("AAP, PAAM and GlobalPru, which train several times"))
    aap = new.add_argument_group("AAP only")
    aap.add_argument(
        "--minimise",
        choices=MINIMISE,
        help="what is made small within --max-accuracy-drop (default: params, or nothing beyond --params and --flops)",
    )
    aap.add_argument("--rewind-weights", action="store_true", help="rewind the weights too, not only the rate")
    paam = new.add_argument_group("PAAM only")
    paam.add_argument(
        "--learn",
        type=positive,
        metavar="N",
        help="epochs of learning the scores in a round (default: 0.3 of --epochs)",
    )
    paam.add_argument(
        "--lambda",
        type=weight,
        metavar="WEIGHT",
        help="of the mean score in the loss; the larger, the lower the scores (default: found while they are learned)",
    )
    paam.add_argument(
        "--train-filters",
        action="store_true",
        help="train the filters too while scores are learned; an untrained network learns both at once, for --epochs",
    )
    add_globalpru(new.add_argument_group("GlobalPru only"))
    add_how(new)


def add_globalpru(globalpru):
    globalpru.add_argument(
        "--mode",
        choices=("fixed", "mixed"),
        help="one rate for all layers, or rates that follow the layers' Hessian traces (default: fixed)",
    )
    globalpru.add_argument(
        "--alpha", type=weight, metavar="WEIGHT", help="of the l1 norm of the saliencies in the loss"
    )
    globalpru.add_argument("--beta", type=weight, metavar="WEIGHT", help="of the ranking loss")
    globalpru.add_argument(
        "--curve",
        metavar="FILE",
        help="accuracies over rates to draw in the report: what python -m bench.ablations globalpru-rates stored",
    )


def add_rounds(rounds):
    rounds.add_argument(
        "--trained", action="store_true", help="the network that --model package.module:function builds is trained"
    )
    rounds.add_argument(
        "--rewind",
        type=share,
        metavar="SHARE",
        help="of the epochs: a training after a cut is the rest (digits: 0.4; else AAP 0.75, PAAM and GlobalPru 0.5)",
    )
    rounds.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="AAP and PAAM: stop after N trained rounds, with the best so far (default: no limit; PAAM 3)",
    )
    rounds.add_argument("--state", metavar="DIR", help="keep the run here, so that it can be resumed")
    rounds.add_argument("--resume", action="store_true", help="go on with what --state holds, if it holds a run")
    rounds.add_argument("--report", metavar="FILE", help="an HTML page about the run (default: beside --out)")
    rounds.add_argument("--no-report", action="store_true", help="write none")


def add_how(new):
    how = new.add_argument_group("how")
    how.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help="training before pruning; of other methods than once: the whole schedule (digits: 12, others than once 20;"
        " else the papers')",
    )
    how.add_argument("--finetune-epochs", type=count, metavar="N", help="after pruning once (digits: 8; else half)")
    how.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images a step (digits: 64, others than once 32; else the papers')",
    )
    how.add_argument("--seed", type=seed, default=0, help="same seed, same result (default: 0)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    how.add_argument("--processes", type=positive, default=1, metavar="N", help="share every batch (default: 1)")
    how.add_argument(
        "--precision", choices=("32-true", "16-mixed", "bf16-mixed"), default="32-true", help="of training"
    )
    how.add_argument("--compiled", action="store_true", help="train through torch.compile: for a GPU and many epochs")
    how.add_argument("--out", metavar="FILE", help="the packed model (default: runs/MODEL-DATA.safetensors)")
    how.add_argument("--quiet", action="store_true", help="print the final table only")


def add_subject(new):
    """Which network, and which images."""
    subject = new.add_argument_group("network and images")
    subject.add_argument(
        "--model",
        type=network,
        metavar="NAME",
        help=f"{', '.join(models.NETWORKS)}, or package.module:function that builds yours (default: resnet20)",
    )
    subject.add_argument("--weights", metavar="FILE", help="start from this file of paamops.save; it counts as trained")
    subject.add_argument(
        "--data",
        choices=data.NAMES,
        default="digits",
        help="default: digits, which needs no download; folder: your own images, --data-root/class/*.png",
    )
    subject.add_argument("--data-root", default="data", metavar="DIR", help="where the images are (default: data)")
    subject.add_argument(
        "--pinned",
        action="append",
        default=[],
        metavar="NAME",
        help="remove no filter of this module or parameter of the network (`explain` lists them); may be given several"
        " times",
    )


def amount(text):
    """A fraction (0.5) or a whole number (100000)."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if value >= 1 if kind is int else 0 < value <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction above 0, up to 1.0, nor a whole number from 1 up")


def whole(text, least, most=None):
    """A whole number from `least` to `most`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} must be {limits}")
    return value


def points(text):
    """Percentage points, as a fraction."""
    value = number(text)
    if not -100 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} must be -100 to 100")
    return value / 100


def share(text):
    """A share from 0 on and below 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0 and below 1")
    return value


def inside(text):
    """A share above 0 and below 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and below 1")
    return value


def weight(text):
    """A finite number of at least 0."""
    value = number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0")
    return value


def number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


count = functools.partial(whole, least=0)
positive = functools.partial(whole, least=1)
seed = functools.partial(whole, least=0, most=2**32 - 1)  # what NumPy takes


def network(text):
    """The name of a built-in network, or package.module:function."""
    module, colon, name = text.partition(":")
    if text not in models.NETWORKS and not (module and colon and name):
        known = ", ".join(models.NETWORKS)
        raise argparse.ArgumentTypeError(f"{text!r}; it must be one of {known}, or package.module:function")
    return text


def check_method(args):
    """Refuse what the chosen method has no use for, rather than ignore it."""
    given = [key for key in ("params", "flops", "filters", "rate") if getattr(args, key) is not None]
    wrong = [key for key in UNUSED[args.method] if getattr(args, key) is not None and getattr(args, key) is not False]
    if len(given) > 1 and args.method != "aap":
        args.error(f"--{given[1]}: not allowed with --{given[0]}; only --method aap meets several targets")
    if wrong:
        args.error(f"--{wrong[0].replace('_', '-')}: not for --method {args.method}")
    if args.minimise and args.max_accuracy_drop is None:
        args.error("--minimise: needs --max-accuracy-drop")
    if args.method != "once" and args.epochs == 0:
        skips = "it trains several times; --trained skips the first"
        args.error(f"--epochs: '0' must be at least 1 for --method {args.method}: {skips}")
    if args.trained and not args.weights and ":" not in (args.model or ""):
        args.error("--trained: needs --model package.module:function, or --weights; a built-in network is untrained")
    if args.resume and args.state is None:
        args.error("--resume: needs --state")
    if args.curve and args.no_report:
        args.error("--curve: not allowed with --no-report")
    if args.report and args.no_report:
        args.error("--report: not allowed with --no-report")
