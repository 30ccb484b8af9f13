"""python -m bench.recipes NAME --data-root DIR [--minutes 55]: run a recipe for so long, and go on when called again.

It runs `python -m paamops prune` with the paper's settings, stops it after the given minutes, and says how far it is.
The exit code is 3 until the recipe is done, then 0; 1 if it failed. Done, it writes bench/results/recipe-NAME.json.
Options that it does not know, such as --compiled, go to the command; with one that changes what is computed, or another
--precision than the paper's, the result is no longer the recipe's and stays in the folder of the run.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from paamops import checkpoint, cli

from .. import machine
from ..__main__ import RESULTS
from . import RECIPES

UNFINISHED = 3  # the exit code
PRECISION = "32-true"  # the paper's
PATIENCE = 30  # seconds that the command has to stop by itself
SAME = ("--compiled", "--processes", "--debug")  # options with which a recipe is still that recipe


def main(arguments=None):
    options, extra = _parser().parse_known_args(arguments)
    recipe, state = RECIPES[options.recipe], Path(options.runs) / options.recipe
    state.mkdir(parents=True, exist_ok=True)
    words = command(options.recipe, recipe, options, extra)
    print(f"python -m paamops {shlex.join(words)}", flush=True)
    start = time.monotonic()
    code, lines = run([sys.executable, "-m", "paamops", *words], state / "log.txt", 60 * options.minutes)
    spend(state, time.monotonic() - start)
    if code is None or code == 130:
        print(f"{options.recipe}: not finished; {progress(state)}. The same command goes on.")
        return UNFINISHED
    rows = table(lines)
    if code not in (0, cli.NOT_MET) or not {"test accuracy", "parameters", "FLOPs an image"} <= rows.keys():
        print(f"{options.recipe}: the command failed with exit code {code}; see {state / 'log.txt'}", file=sys.stderr)
        return 1
    changed = options.precision != PRECISION or any(
        word.startswith("--") and word.split("=")[0] not in SAME for word in extra
    )
    path = (state if changed else RESULTS) / f"recipe-{options.recipe}.json"
    result = compare(recipe, rows) | {"recipe": options.recipe, "command": f"python -m paamops {shlex.join(words)}"}
    result |= {"met": code == 0, "seconds": round(spend(state, 0)), "date": datetime.date.today().isoformat()}
    trained = sum(entry["accuracy"] is not None for entry in history(state)[1:])
    result |= {"rounds_trained": trained, "machine": machine.facts(options.device)}
    write(path, result)
    print(f"{options.recipe}: done; {path}\n{told(result)}")
    return 0


def command(name, recipe, options, extra=()):
    """The words after `python -m paamops`."""
    state = Path(options.runs) / name
    return [
        *("prune", "--model", recipe.model, "--data", "cifar10", "--data-root", options.data_root, *recipe.words),
        *("--device", options.device, "--precision", options.precision),
        *("--state", str(state / "state"), "--resume"),
        *("--out", str(state / "model.safetensors"), "--report", str(state / "report.html")),
        *extra,
    ]


def run(words, log, seconds):
    """(Exit code, or None after a stop at `seconds`; the lines of its standard output). All it says goes to `log` too.

    It is asked to stop with SIGINT, and killed if it does not: what it has stored serves the next call in either case.
    """
    lines = []
    # A shell starts what it runs in the background with SIGINT ignored, and the command would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "a") as file:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # it may start processes of its own, which are to stop with it
        )

        def follow():
            for line in process.stdout:
                lines.append(line)
                file.write(line)
                file.flush()
                print(line, end="", flush=True)

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
            reader.join(PATIENCE)
    return code, lines


def stop(process):
    """End `process`, if it has not ended, and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def progress(state):
    """How far a run is, as its folder tells."""
    rounds = history(state)
    parts = [f"{spend(state, 0) / 60:.0f} minutes in all"]
    if rounds and "name" in rounds[0]:  # of GlobalPru
        parts += [f"stage {stage['name']}: validation accuracy {stage['accuracy']:.2%}" for stage in rounds]
    elif rounds and "outcome" not in rounds[0]:  # of PAAM
        *_, last = rounds
        parts.append(f"{len(rounds) - 1} rounds; validation accuracy {last['accuracy']:.2%} after the last")
        parts[-1] += f" ({rounds[0]['accuracy']:.2%} unpruned)"
    elif rounds:
        kept = [entry for entry in rounds if entry["outcome"] in ("start", "accepted")]
        least, whole = min(kept, key=lambda entry: entry["params"] + entry["flops"]), rounds[0]
        parts.append(
            f"{len(rounds) - 1} rounds; the smallest network that was accepted has"
            f" {least['params'] / whole['params']:.1%} of the parameters and {least['flops'] / whole['flops']:.1%} of"
            f" the FLOPs, validation accuracy {least['accuracy']:.2%} ({whole['accuracy']:.2%} unpruned)"
        )
    with contextlib.suppress(ValueError):
        facts = checkpoint.facts(state / "state" / "training.safetensors")
        parts.append(f"epoch {facts['epoch']} of {facts['epochs']} of a training, {facts['images_per_s']:,} images/s")
    return "; ".join(parts)


def history(state):
    """The rounds that the run has stored."""
    try:
        return json.loads((state / "state" / "state.json").read_text())["history"]
    except FileNotFoundError:
        return []


def spend(state, seconds):
    """The seconds that all calls for this folder took together, `seconds` more than before.

    What is not there or is no such number counts as 0: it is not worth a run.
    """
    path, total = state / "seconds.txt", 0.0
    with contextlib.suppress(FileNotFoundError, ValueError):
        stored = float(path.read_text())
        total = stored if math.isfinite(stored) and stored >= 0 else 0.0
    total += seconds
    replace(path, f"{total:.1f}\n")
    return total


def table(lines):
    """name -> (before, after) of the table that the command prints last, as numbers in the table's units."""
    rows = {}
    for line in lines:
        parts = re.split(r"\s{2,}", line.strip())
        if len(parts) == 4:
            with contextlib.suppress(ValueError):
                rows[parts[0]] = tuple(float(part.split(" ")[0].replace(",", "")) for part in parts[1:3])
    return rows


def compare(recipe, rows):
    """Before and after, what was removed, the paper's figures, and the differences from them, in points."""
    accuracy, params, flops = (rows[name] for name in ("test accuracy", "parameters", "FLOPs an image"))
    keys = ("accuracy_drop", "params_removed", "flops_removed")
    ours = (accuracy[0] - accuracy[1], *(100 * (1 - after / before) for before, after in (params, flops)))
    paper = dict(zip(keys, recipe.paper, strict=True)) if recipe.paper else None
    reached = {key: round(value, 2) for key, value in zip(keys, ours, strict=True)}
    differences = {} if recipe.accuracy is None else {"accuracy": accuracy[0] - recipe.accuracy}
    differences |= {key: reached[key] - paper[key] for key in keys if paper and paper[key] is not None}
    return {
        "before": {"accuracy": accuracy[0], "params": params[0], "mflops": flops[0]},
        "after": {"accuracy": accuracy[1], "params": params[1], "mflops": flops[1]},
        "reached": reached,
        "paper": {"accuracy": recipe.accuracy, "reached": paper},
        "difference": {key: round(value, 2) for key, value in differences.items()},
    }


def told(result):
    """The comparison as a table."""
    lines = [f"{'':24}{'here':>10}{'paper':>10}{'difference':>12}"]
    paper = {"accuracy": result["paper"]["accuracy"], **(result["paper"]["reached"] or {})}
    here = {"accuracy": result["before"]["accuracy"], **result["reached"]}
    names = ("accuracy unpruned, %", "accuracy drop, points", "parameters removed, %", "FLOPs removed, %")
    for key, name in zip(here, names, strict=True):
        known = paper.get(key) is not None
        theirs = (f"{paper[key]:.2f}", f"{result['difference'][key]:+.2f}") if known else ("-", "-")
        lines.append(f"{name:24}{here[key]:>10.2f}{theirs[0]:>10}{theirs[1]:>12}")
    return "\n".join(lines)


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def replace(path, text):
    """The file is written whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data-root", required=True, metavar="DIR", help="where cifar-10-batches-bin is")
    parser.add_argument("--minutes", type=float, default=55, help="stop after so many (default: 55)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--precision", choices=(PRECISION, "16-mixed", "bf16-mixed"), default=PRECISION)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the run is kept (default: runs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
