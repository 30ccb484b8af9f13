"""The command line: `python -m paamops prune | explain | info`."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from paamops import __version__, data, models, saving
from paamops.methods.objective import MINIMISE

EXAMPLES = """\
examples:
  python -m paamops prune
      train ResNet-20 on scikit-learn's digits, remove half of its parameters, compare (a minute or two)
  python -m paamops prune --method aap --max-accuracy-drop 1.0
      the smallest ResNet-20 that loses at most one point of accuracy (a few minutes)
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

NOT_MET = 3  # the exit code

# The digits are few and easy: fewer epochs and images a step than the papers' schedules have.
DIGITS = {"epochs": 12, "finetune_epochs": 8, "batch_size": 64}
DIGITS_AAP = {"epochs": 20, "rewind": 0.4, "batch_size": 32}
DIGITS_RATE = 0.5  # times the schedule's learning rate, as the batches are a fraction of the papers'
# The 315 validation digits tell an accuracy to about half a point, and the smallest of many networks that pass is one
# that was lucky with them: half of the drop that is allowed is kept back, so that it is likelier to hold for other
# images too.
DIGITS_RESERVE = 0.5


def main(argv=None):
    """Run one command; the exit code: 0, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C.

    3: all was done and written, but AAP's target was not met.
    """
    debug, state = False, None
    try:
        args = parser().parse_args(argv)
        if args.run is run_prune:
            check_method(args)
            state = args.state
        args.words = sys.argv[1:] if argv is None else argv
        debug = args.debug
        with warnings_in_one_line():
            return args.run(args) or 0
    except KeyboardInterrupt:
        complain("interrupted; the same command with --resume goes on" if state else "interrupted")
        return 130
    except Exception as error:
        if debug:
            raise
        complain(str(error) or type(error).__name__)
        return 1


def complain(message):
    """One line on stderr, from the first of the processes that share the work: the others fail with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"paamops: {' '.join(str(message).split())}", file=sys.stderr)


def tell(line):
    """Print a line at once. Where nobody reads any more (`| head -1`) all goes on in silence: much is still to do."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what is still in the buffer goes there too


@contextlib.contextmanager
def warnings_in_one_line():
    """Meanwhile a UserWarning of paamops is told like an error; its place in the source helps nobody."""
    usual, here = warnings.showwarning, Path(__file__).parent

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, UserWarning) and here in Path(filename).parents:
            complain(message)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        complain(f"{message}; see {self.prog} --help")
        sys.exit(2)


def parser():
    """The argument parser."""
    top = Parser(
        prog="python -m paamops",
        description="Make a convolutional network smaller and faster by removing whole filters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"paamops {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    add_prune(commands)
    add_subject(command(commands, "explain", "show which filters can be removed, which cannot, and why", run_explain))
    command(commands, "info", "say what was built, and which kernels serve which device", run_info)
    return top


def command(commands, name, help, run):
    new = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    new.add_argument("--debug", action="store_true", help="show the traceback of an error")
    new.set_defaults(run=run, error=new.error)
    return new


def add_prune(commands):
    new = command(commands, "prune", "train a network, remove its least active filters, fine-tune, compare", run_prune)
    new.epilog = f"Exit code {NOT_MET}: the target was not met; the best network that was found is saved all the same."
    add_subject(new)
    new.add_argument(
        "--method",
        choices=("once", "aap"),
        default="once",
        help="once: score, prune and fine-tune once; aap: automatic attention pruning, round by round to the target"
        " (default: once)",
    )
    budget = new.add_argument_group(
        "what to keep",
        "A fraction such as 0.5, or a whole number. Once: one of these, by default --params 0.5. AAP: --params, --flops"
        " or both, --max-accuracy-drop, or all; by default --max-accuracy-drop 1.0.",
    )
    budget.add_argument("--params", type=amount, metavar="KEEP", help="parameters to keep")
    budget.add_argument("--flops", type=amount, metavar="KEEP", help="FLOPs to keep")
    budget.add_argument("--filters", type=amount, metavar="KEEP", help="filters to keep (once only)")
    budget.add_argument(
        "--max-accuracy-drop",
        type=points,
        metavar="POINTS",
        help="percentage points of accuracy to lose, on validation images. With --data digits, which has few of them,"
        " rounds may lose half of it only: the rest is kept back, so that it is likelier to hold for other images too",
    )
    rounds = new.add_argument_group("AAP only")
    rounds.add_argument(
        "--minimise",
        choices=MINIMISE,
        help="what is made small within --max-accuracy-drop (default: params, or nothing beyond --params and --flops)",
    )
    rounds.add_argument(
        "--trained", action="store_true", help="the network that --model package.module:function builds is trained"
    )
    rounds.add_argument(
        "--rewind",
        type=share,
        metavar="SHARE",
        help="of the epochs: each round retrains the rest (digits: 0.4; else 0.75)",
    )
    rounds.add_argument("--rewind-weights", action="store_true", help="rewind the weights too, not only the rate")
    rounds.add_argument(
        "--rounds", type=positive, metavar="N", help="stop after N trained rounds, with the best so far"
    )
    rounds.add_argument("--state", metavar="DIR", help="keep the run here, so that it can be resumed")
    rounds.add_argument("--resume", action="store_true", help="go on with what --state holds, if it holds a run")
    rounds.add_argument("--report", metavar="FILE", help="an HTML page about the run (default: beside --out)")
    rounds.add_argument("--no-report", action="store_true", help="write none")
    how = new.add_argument_group("how")
    how.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help="training before pruning; AAP: the whole schedule (digits: 12, AAP 20; else the paper's)",
    )
    how.add_argument("--finetune-epochs", type=count, metavar="N", help="after pruning once (digits: 8; else half)")
    how.add_argument(
        "--batch-size", type=positive, metavar="N", help="images a step (digits: 64, AAP 32; else the paper's)"
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
    subject.add_argument("--weights", metavar="FILE", help="start from this file of paamops.save; --epochs is then 0")
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
        help="remove no filter of this module or parameter of the network; may be given several times",
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


def run_prune(args):
    """Train, prune, save, compare. The exit code."""
    from paamops import pruning, training

    name = model_name(args)
    out = Path(args.out or f"runs/{name}-{args.data}.safetensors")
    page = None if args.no_report or args.method == "once" else Path(args.report or out.with_suffix(".html"))
    if page and os.path.realpath(page) == os.path.realpath(out):
        raise ValueError(f"--out {out}: is the report's file too; name another for --report, or say --no-report")
    check_writable(out)
    if page:
        check_writable(page, "--report")
        find_matplotlib()
    check_device(args.device)
    fabric = training.make_fabric(args.device, args.precision, args.processes)
    for logger in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)  # not how the processes find each other
    fabric.launch()
    fabric.seed_everything(args.seed, verbose=False)
    leads = fabric.is_global_zero
    say = tell if leads and not args.quiet else ignore

    dataset = data.load(args.data, args.data_root)
    model = find_model(args, dataset.shape, dataset.num_classes)
    plan = make_plan(args, name)
    sizes = ", ".join(f"{len(getattr(dataset, split))} {split}" for split in ("train", "validation", "test"))
    say(f"{name} on {args.data} ({sizes} images), {fabric.device}, seed {args.seed}")
    quiet = args.quiet or not leads
    budget = {key: getattr(args, key) for key in ("params", "flops", "filters") if getattr(args, key) is not None}
    result = None
    if args.method == "aap":
        settings = aap_settings(args, budget)
        if keeps_back(args, asked_drop(args, budget)):
            say(told_reserve(asked_drop(args, budget), len(dataset.validation)))
        result = pruning.prune_to_target(model, dataset, fabric, plan, **settings, say=say, quiet=quiet)
        if result.met:
            say(result.message)
        model, small = result.dense, result.model
    else:
        small, _ = pruning.prune(model, dataset, fabric, plan, budget or {"params": 0.5}, say, quiet, args.pinned)
    if leads:
        saving.save(small, out)  # before anything else can go wrong
        say(f"saved to {out}")
        rows = pruning.report(model, small, dataset.to(fabric.device))
        if page:
            result.report(page, rows, shlex.join(["python", "-m", "paamops", *args.words]))
            say(f"report: {page}")
        tell(pruning.table(rows))
    fabric.barrier()
    if result is None or result.met:
        return 0
    if args.processes > 1:
        # The launcher terminates the first process when it sees another end with a code other than 0. All is written.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    complain(result.message)
    return NOT_MET


def check_method(args):
    """Refuse what the chosen method has no use for, rather than ignore it."""
    given = [key for key in ("params", "flops", "filters") if getattr(args, key) is not None]
    if args.method == "aap":
        wrong = [key for key in ("filters", "finetune_epochs") if getattr(args, key) is not None]
    else:
        wrong = [
            key
            for key in ("max_accuracy_drop", "minimise", "rewind", "rounds", "state", "report")
            if getattr(args, key) is not None
        ]
        wrong += [key for key in ("trained", "rewind_weights", "resume", "no_report", "compiled") if getattr(args, key)]
        if len(given) > 1:
            args.error(f"--{given[1]}: not allowed with --{given[0]}; only --method aap meets several targets")
    if wrong:
        args.error(f"--{wrong[0].replace('_', '-')}: not for --method {args.method}")
    if args.minimise and args.max_accuracy_drop is None:
        args.error("--minimise: needs --max-accuracy-drop")
    if args.method == "aap" and args.epochs == 0:
        args.error("--epochs: '0' must be at least 1 for --method aap: each round retrains; --trained skips the first")
    if args.trained and not args.weights and ":" not in (args.model or ""):
        args.error("--trained: needs --model package.module:function, or --weights; a built-in network is untrained")
    if args.resume and args.state is None:
        args.error("--resume: needs --state")
    if args.report and args.no_report:
        args.error("--report: not allowed with --no-report")


def aap_settings(args, budget):
    """What AAP is told, from the command line."""
    from paamops.methods.objective import Objective

    drop = asked_drop(args, budget)
    if keeps_back(args, drop):
        drop = DIGITS_RESERVE * drop
    if drop is not None:
        budget = budget | {"max_accuracy_drop": drop}
    rewind = args.rewind
    if rewind is None:
        rewind = DIGITS_AAP["rewind"] if args.data == "digits" else 0.75
    return {
        "objective": Objective(**budget, minimise=args.minimise),
        "rewind": rewind,
        "rewind_weights": args.rewind_weights,
        "trained": args.trained or bool(args.weights),
        "pinned": args.pinned,
        "rounds": args.rounds,
        "state": args.state,
        "resume": args.resume,
    }


def asked_drop(args, budget):
    """The accuracy that may be lost, as a fraction, or None: one point where nothing else is asked for."""
    return 0.01 if not budget and args.max_accuracy_drop is None else args.max_accuracy_drop


def keeps_back(args, drop):
    """Whether a part of the drop is kept back."""
    return args.data == "digits" and drop is not None and drop > 0


def told_reserve(drop, images):
    """What is kept back, in a line."""
    asked, lose = (round(100 * value, 3) for value in (drop, DIGITS_RESERVE * drop))
    return (
        f"rounds may lose {lose} of the {asked} points on the {images} validation images; the other half is kept back,"
        " so that the drop is likelier to hold for other images too"
    )


def find_matplotlib():
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib: pip install paamops[train], or say --no-report")


def run_explain(args):
    import torch

    from paamops.tracing import trace

    shape, num_classes = data.describe(args.data, args.data_root)
    tell(trace(find_model(args, shape, num_classes), torch.zeros(1, *shape), args.pinned).explain())


def run_info(args):
    from paamops.ops.registration import build_info

    for key, value in build_info().items():
        if isinstance(value, dict):
            tell(f"{key}:")
            for inner, what in value.items():
                tell(f"  {inner}: {', '.join(map(' '.join, what.items())) if isinstance(what, dict) else what}")
        else:
            tell(f"{key}: {value}")


def make_plan(args, name):
    """The papers' schedule, but for what the command line or the digits say."""
    from paamops.pruning import Plan
    from paamops.training import schedule_for

    schedule = schedule_for(name)
    defaults = {"epochs": schedule.epochs, "finetune_epochs": schedule.epochs // 2, "batch_size": schedule.batch_size}
    if args.data == "digits":
        defaults |= DIGITS
    if args.method == "aap":
        if args.data == "digits":
            defaults |= {key: DIGITS_AAP[key] for key in ("epochs", "batch_size")}
            schedule = replace(schedule, rate=DIGITS_RATE * schedule.rate)
    elif args.weights:
        defaults |= {"epochs": 0}
    chosen = {key: default if getattr(args, key) is None else getattr(args, key) for key, default in defaults.items()}
    return Plan(schedule=schedule, seed=args.seed, compiled=args.compiled, **chosen)


def model_name(args):
    """A short name of the network: of the built-in one, of the user's function, or of the file it comes from."""
    if args.model is None and args.weights:
        return Path(args.weights).stem
    return (args.model or "resnet20").replace(":", "-")


def find_model(args, shape, num_classes):
    """The network that the command line names, for images of `shape` (c, h, w)."""
    own = functools.partial(build_own, args.model) if args.model and ":" in args.model else None
    if args.weights:
        try:
            model = saving.load(args.weights, own)
        except saving.UnknownNetworkError as error:
            held = str(error).partition(";")[0]
            raise ValueError(f"{held}; say which function builds it: --model package.module:function") from error
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


def build_own(text):
    """What the function that "package.module:function" names builds; modules in the current folder are found too."""
    import torch

    module, _, name = text.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {text}: cannot import {module!r} ({type(error).__name__}: {error})") from error
    build = getattr(found, name, None)
    if not callable(build):
        raise ValueError(f"--model {text}: {module} has no function {name!r}")
    try:
        model = build()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {text}: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model {text}: {name}() returned a {type(model).__name__}; it must be a torch.nn.Module")
    return model


def check_writable(path, option="--out"):
    """Know before an hour of training that a file can be stored: the one that is written first is made once."""
    try:
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        probe = saving.partial_file(saving.destination(path))
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot write to {path.parent} ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def check_device(device):
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU on this machine; use --device cpu")


def ignore(*_):
    pass
