"""python -m bench [pattern]: check, then time our ops and their baselines; the results go to bench/results/."""

import argparse
import datetime
import json
import os
import pathlib
import sys

import torch

from . import machine
from .harness import all_cases, bandwidth, measure

RESULTS = pathlib.Path(__file__).parent / "results"


def main(arguments=None):
    """Run the cases whose name or op contains the pattern. Exit code 1 if the check of one of them failed."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: no GPU that torch can use on this machine; nothing was timed", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads or torch.get_num_threads())
    wanted = [c for c in all_cases() if options.pattern in c.name and options.device in c.devices]
    if not wanted:
        print(f"bench: no case for {options.device} contains {options.pattern!r}", file=sys.stderr)
        return 2

    seconds = 0.2 if options.quick else 2.0
    run = machine.facts(options.device)
    run["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run["bandwidth"] = bandwidth(options.device, seconds / 2)
    print(f"{run['device']}, {run['threads']} threads, torch {run['torch']}, compiler {run['compiler']}")
    print(f"measured bandwidth: copy {run['bandwidth']['copy']:.1f} GB/s, sum {run['bandwidth']['sum']:.1f} GB/s\n")

    results, refused = {}, []
    for case in wanted:
        try:
            results[case.name] = measure(case, options.device, seconds)
        except AssertionError as error:
            refused.append(case.name)
            results[case.name] = {"op": case.op, "refused": str(error)}
            print(f"{case.name}\n  NOT TIMED: it differs from the float64 reference\n  {error}\n")
        else:
            print(report(case.name, results[case.name], run["bandwidth"]))
    if not options.no_save:
        path = RESULTS / f"{machine.name(options.device)}.json"
        save(path, run, results)
        print(f"wrote {path}")
    if refused:
        print(f"refused {len(refused)} of {len(wanted)}: {', '.join(refused)}", file=sys.stderr)
    return 1 if refused else 0


def report(name, result, measured):
    """The lines that say how one case did."""
    lines = [name]
    for function, time in result["times"].items():
        line = f"  {function:<16}{time['median']:>10.4f} ms   [{time['p20']:.4f} .. {time['p80']:.4f}]"
        if function == "ours":
            if rate := result["gbytes_per_s"]:
                line += (
                    f"   {rate:.1f} GB/s = {rate / measured['copy']:.0%} of copy, {rate / measured['sum']:.0%} of sum"
                )
            if rate := result["gflops_per_s"]:
                line += f"   {rate:.1f} GFLOP/s"
        else:
            line += f"   {result['ratio'][function]:.2f}x"
            if function in result["target"]:
                target = result["target"][function]
                line += f"   target {target['at_least']:.2f}x {'met' if target['met'] else 'NOT MET'}"
            if function in result["compile_s"]:
                line += f"   (compiled in {result['compile_s'][function]:.1f} s)"
        lines.append(line)
    lines += [f"  {function:<16}failed: {why}" for function, why in result["failed"].items()]
    return "\n".join(lines) + "\n"


def save(path, run, results):
    """Merge the results into the file by case name; the file is replaced whole or not at all."""
    stored = json.loads(path.read_text()) if path.exists() else {"runs": {}, "cases": {}}
    stored["runs"][run["date"]] = run
    stored["cases"] |= {name: {"run": run["date"], **result} for name, result in results.items()}
    used = {case["run"] for case in stored["cases"].values()}
    stored["runs"] = {date: facts for date, facts in sorted(stored["runs"].items()) if date in used}
    stored["cases"] = dict(sorted(stored["cases"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(stored), indent=1) + "\n")
    os.replace(temporary, path)


def _rounded(value):
    """Four significant digits: more is noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="part of the cases' names (default: all cases)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time: for a first look, not for figures")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-save", action="store_true", help="print only, leave bench/results/ as it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
