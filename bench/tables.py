"""python -m bench.tables: write the README's measured tables from bench/results/.

A table stands between `<!-- bench: NAME -->` and `<!-- end of bench -->`, where NAME is a file of bench/results/
without its ending: of `python -m bench`, of `python -m bench.main_job`, of `python -m bench.methods_job`, or of
`python -m bench.peer_torch_pruning`. Nothing between them is written by hand.
"""

import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def main():
    """Rewrite README.md where its tables are not what the results say."""
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(), ROOT / "bench" / "results"))


def fill(text, results):
    """`text` with the table of results/NAME.json between each pair of markers."""
    return MARKED.sub(lambda m: m[1] + table(json.loads((results / f"{m[2]}.json").read_text())) + m[3], text)


def table(stored):
    """A Markdown table of one machine's results, and below it what they were measured with."""
    if "attacks" in stored:
        from bench import robustness  # here, so that the other tables need no build

        return robustness.table(stored)
    if "peer" in stored:
        from bench import peer_torch_pruning

        return peer_torch_pruning.table(stored)
    if "methods" in stored:
        return methods(stored)
    if "seeds" in stored:
        return main_job(stored)
    lines = [
        "| case | time (p20 to p80), ms | GB/s | of measured copy | times faster than |",
        "|---|---|---|---|---|",
    ]
    for name, case in stored["cases"].items():
        if "refused" in case:
            lines.append(f"| {name} | not timed: differs from its reference | | | |")
            continue
        ours, rate = case["times"]["ours"], case["gbytes_per_s"]
        share = f"{rate / stored['runs'][case['run']]['bandwidth']['copy']:.0%}" if rate else ""
        ratios = ", ".join(f"{baseline} {_number(ratio)}" for baseline, ratio in case["ratio"].items())
        spread = f"{_number(ours['median'])} ({_number(ours['p20'])} to {_number(ours['p80'])})"
        lines.append(f"| {name} | {spread} | {_number(rate) if rate else ''} | {share} | {ratios} |")
    facts = dict.fromkeys(
        f"{run['device']}, {run['threads']} CPU threads, torch {run['torch']}, triton {run['triton']}, "
        f"{run['compiler']}, {run['date'][:10]}; measured copy {_number(run['bandwidth']['copy'])} GB/s, "
        f"sum {_number(run['bandwidth']['sum'])} GB/s."
        for run in stored["runs"].values()
    )
    return "\n".join(lines) + "\n\n" + "\n\n".join(facts) + "\n"


def main_job(stored):
    """What `python -m paamops prune` printed, a pair of columns for each seed."""
    seeds = stored["seeds"]
    lines = [
        "| | " + " | ".join(f"before, seed {seed} | after | change" for seed in seeds) + " |",
        "|---" * (1 + 3 * len(seeds)) + "|",
    ]
    for rows in zip(*(run["rows"] for run in seeds.values()), strict=True):
        lines.append(f"| {rows[0][0]} | " + " | ".join(" | ".join(row[1:]) for row in rows) + " |")
    facts = stored["machine"]
    seconds = ", ".join(str(run["seconds"]) for run in seeds.values())
    lines += [
        "",
        f"`{stored['command']}`: {seconds} s in all; {facts['device']}, {facts['threads']} CPU threads, "
        f"torch {facts['torch']}, {facts['date']}.",
    ]
    return "\n".join(lines) + "\n"


def methods(stored):
    """What `python -m bench.methods_job` stored, a line for each method: mean and, in brackets, the range."""
    seeds = stored["seeds"].values()
    lines = [
        "| | test accuracy, % | parameters left, % | FLOPs left, % | epochs after the first training |",
        "|---|---|---|---|---|",
    ]
    for name, title in stored["methods"].items():
        runs, whole = [run[name] for run in seeds if name in run], [run["dense"] for run in seeds if name in run]
        if not runs:
            continue
        shares = [
            [100 * run[size] / dense[size] for run, dense in zip(runs, whole, strict=True)]
            for size in ("params", "flops")
        ]
        epochs = [0 if name == "dense" else run["epochs"] for run in runs]
        cells = [
            _spread([run["accuracy"] for run in runs], "{:.2f}"),
            *(_spread(share, "{:.1f}") for share in shares),
            _spread(epochs, "{:.0f}"),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    facts, numbers = stored["machine"], list(stored["seeds"])
    told = f"seeds {', '.join(numbers)}" if len(numbers) > 1 else f"seed {numbers[0]}"
    lines += [
        "",
        f"`{stored['command']}`, {told}: mean (lowest to highest); {facts['device']}, {facts['threads']} CPU threads, "
        f"torch {facts['torch']}, {facts['date']}.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values, shape):
    """The mean, and the range where there is one."""
    low, high, mean = (shape.format(value) for value in (min(values), max(values), statistics.fmean(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _number(value):
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
