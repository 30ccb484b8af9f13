"""The command line: `python -m paamops prune | explain | info`."""

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from paamops import arguments, data, models, saving
from paamops.arguments import NOT_MET, check_method, complain, positive  # noqa: F401  (positive: for bench/)

# The digits are few and easy: fewer epochs and images a step than the papers' schedules have.
DIGITS = {"epochs": 12, "finetune_epochs": 8, "batch_size": 64}
DIGITS_AAP = {"epochs": 20, "rewind": 0.4, "batch_size": 32}
DIGITS_PAAM = {"epochs": 20, "rewind": 0.4, "batch_size": 32}
DIGITS_GLOBALPRU = {"epochs": 20, "rewind": 0.4, "batch_size": 32}
DIGITS_RATE = 0.5  # times the schedule's learning rate, as the batches are a fraction of the papers'
# The 315 validation digits tell an accuracy to about half a point, and the smallest of many networks that pass is one
# that was lucky with them: half of the drop that is allowed is kept back, so that it is likelier to hold for other
# images too.
DIGITS_RESERVE = 0.5
PAAM_REWIND, PAAM_LEARN, PAAM_ROUNDS = 0.5, 0.3, 3  # where retraining starts and how many epochs learn: of --epochs
GLOBALPRU_REWIND = 0.5
HALF = {"params": 0.5}  # the budget where none is given


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


def parser():
    """The argument parser."""
    return arguments.parser(prune=run_prune, explain=run_explain, info=run_info)


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
    curve = read_curve(args.curve) if args.curve else None
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
    budget = {
        key: getattr(args, key) for key in ("params", "flops", "filters", "rate") if getattr(args, key) is not None
    }
    result = None
    if args.method == "aap":
        settings = aap_settings(args, budget)
        if keeps_back(args, asked_drop(args, budget)):
            say(told_reserve(asked_drop(args, budget), len(dataset.validation)))
        result = pruning.prune_to_target(model, dataset, fabric, plan, **settings, say=say, quiet=quiet)
        if result.met:
            say(result.message)
        model, small = result.dense, result.model
    elif args.method == "paam":
        result = pruning.prune_by_scores(
            model, dataset, fabric, plan, **paam_settings(args, budget, plan), say=say, quiet=quiet
        )
        say(result.message)
        model, small = result.dense, result.model
    elif args.method == "globalpru":
        result = pruning.prune_by_ranking(
            model, dataset, fabric, plan, **globalpru_settings(args, budget), say=say, quiet=quiet
        )
        say(result.message)
        model, small = result.whole, result.model
    else:
        criterion = args.criterion or "attention"
        small, _ = pruning.prune(model, dataset, fabric, plan, budget or HALF, say, quiet, args.pinned, criterion)
    if leads:
        saving.save(small, out)  # before anything else can go wrong
        say(f"saved to {out}")
        rows = pruning.report(model, small, dataset.to(fabric.device))
        if page:
            drawn = {"curve": curve} if curve else {}
            result.report(page, rows, shlex.join(["python", "-m", "paamops", *args.words]), **drawn)
            say(f"report: {page}")
        tell(pruning.table(rows))
    fabric.barrier()
    if args.method != "aap" or result.met:
        return 0
    if args.processes > 1:
        # The launcher terminates the first process when it sees another end with a code other than 0. All is written.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    complain(result.message)
    return NOT_MET


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


def paam_settings(args, budget, plan):
    """What PAAM is told, from the command line. ValueError: learning would go beyond the schedule's end."""
    budget = budget or HALF
    rewind = args.rewind
    if rewind is None:
        rewind = DIGITS_PAAM["rewind"] if args.data == "digits" else PAAM_REWIND
    learn = args.learn or max(1, round(PAAM_LEARN * plan.epochs))
    start = round(rewind * plan.epochs) if args.train_filters else 0
    if start + learn > plan.epochs:
        where = f" from epoch {start} on, where --rewind starts," if start else ""
        raise ValueError(f"--learn: {learn} epochs{where} go beyond the {plan.epochs} of --epochs")
    return {
        "budget": budget,
        "penalty": getattr(args, "lambda"),
        "rewind": rewind,
        "rounds": args.rounds or PAAM_ROUNDS,
        "learn": learn,
        "frozen": not args.train_filters,
        "trained": args.trained or bool(args.weights),
        "pinned": args.pinned,
        "state": args.state,
        "resume": args.resume,
    }


def globalpru_settings(args, budget):
    """What GlobalPru is told, from the command line."""
    rewind = args.rewind
    if rewind is None:
        rewind = DIGITS_GLOBALPRU["rewind"] if args.data == "digits" else GLOBALPRU_REWIND
    given = {key: getattr(args, key) for key in ("mode", "alpha", "beta") if getattr(args, key) is not None}
    return given | {
        "asked": budget or {"rate": 0.5},
        "rewind": rewind,
        "trained": args.trained or bool(args.weights),
        "pinned": args.pinned,
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


def read_curve(path):
    """name -> [(rate, accuracy), ...] from the runs of an ablation over rates."""
    try:
        curve = {}
        for run in json.loads(Path(path).read_text())["runs"]:
            curve.setdefault(str(run["variant"]), []).append((float(run["removed"]), float(run["after"])))
    except OSError as error:
        raise ValueError(f"--curve {path}: cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--curve {path}: is not what bench.ablations stored ({error!r})") from error
    if not curve:
        raise ValueError(f"--curve {path}: holds no runs")
    return curve


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
    if args.method != "once":
        if args.data == "digits":
            digits = {"aap": DIGITS_AAP, "paam": DIGITS_PAAM, "globalpru": DIGITS_GLOBALPRU}[args.method]
            defaults |= {key: digits[key] for key in ("epochs", "batch_size")}
            schedule = digits_schedule(schedule)
    elif args.weights:
        defaults |= {"epochs": 0}
    chosen = {key: default if getattr(args, key) is None else getattr(args, key) for key, default in defaults.items()}
    return Plan(schedule=schedule, seed=args.seed, compiled=args.compiled, **chosen)


def digits_schedule(schedule):
    """The schedule with the learning rate for the digits' small batches."""
    return replace(schedule, rate=DIGITS_RATE * schedule.rate)


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
