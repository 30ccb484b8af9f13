"""python -m bench.ablations.tables: write the tables of bench/ablations/README.md from bench/results/.

A table stands between `<!-- ablation: NAME -->` and `<!-- end of ablation -->`, where NAME is a file
bench/results/ablation-NAME.json. Nothing between them is written by hand.
"""

import json
import pathlib
import re
import sys

from bench.ablations.spread import deviation, interval, mean, told_apart

HERE = pathlib.Path(__file__).parent
MARKED = re.compile(r"(<!-- ablation: (\S+) -->\n).*?(<!-- end of ablation -->)", re.DOTALL)
# What the others are held against.
BASE = {
    "mapping": "mean, p = 1",
    "order": "image first",
    "criterion": "attention",
    "layer-aware": "one threshold",
    "paam-criterion": "learned",
    "paam-lambda": "automatic",
    "paam-attention": "additive, leaky exponential, slope 0.1",
    "paam-frozen": "frozen",
    "paam-gate": "free",
    "globalpru-beta": "mean saliency, no stage",
    "globalpru-election": "assignment",
    "globalpru-rates": "magnitude",
}
# The paper, §4.4: accuracy against mean, p = 1, in points, of VGG-16 on CIFAR-10 without 57.73 % of its parameters.
PAPER = {"max, p = 1": -0.13, "sum, p = 1": -0.25, "mean, p = 2": -0.04, "mean, p = 4": -0.09}


def main():
    """Rewrite the README where its tables are not what the results say."""
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), HERE.parent / "results"))


def fill(text, results):
    """`text` with the table of results/ablation-NAME.json between each pair of markers."""

    def replaced(match):
        stored = json.loads((results / f"ablation-{match[2]}.json").read_text())
        return f"{match[1]}{table(stored)}{match[3]}"

    return MARKED.sub(replaced, text)


def table(stored):
    """A Markdown table of one ablation on one data set, and below it what it was measured with."""
    name = stored["ablation"]
    kinds = {"rewinding": rewinding, "stability": stability}
    lines = kinds[name](stored) if name in kinds else comparison(stored)
    if name == "layer-aware":
        lines += ["", *widths(stored)]
    return "\n".join([*lines, "", facts(stored)]) + "\n"


def comparison(stored):
    """Variants at equal sizes, held against one of them."""
    base = BASE[stored["ablation"]]
    paper, learns = stored["ablation"] == "mapping", stored["ablation"].startswith(("paam", "globalpru"))
    more = {key: cells for key, cells in LEARNED.items() if learns and any(key in run for run in stored["runs"])}
    head = [
        "parameters removed",
        "variant",
        "FLOPs removed",
        *(head for head, _ in more.values()),
        "accuracy before retraining",
        *([f"against {base}, points"] if learns else []),
        "after",
        f"against {base}, points",
        "told apart",
    ]
    rows = []
    for removed in unique(stored["runs"], "removed"):
        runs = [run for run in stored["runs"] if run["removed"] == removed]
        for variant in unique(runs, "variant"):
            own, other = by_seed(runs, variant), by_seed(runs, base_of(stored["ablation"], variant))
            seeds, own = len(own), {seed: run for seed, run in own.items() if not run.get("diverged")}
            told = variant if len(own) == seeds else f"{variant} (diverged under {seeds - len(own)} of {seeds} seeds)"
            if not own:
                rows.append(["", told, *[""] * (len(head) - 2)])
                continue
            row = [
                percent([run["params_removed"] for run in own.values()]),
                told,
                percent([run["flops_removed"] for run in own.values()]),
                *(shown([run[key] for run in own.values() if key in run]) for key, (_, shown) in more.items()),
                percent([run["before"] for run in own.values()], spread=learns),
                *(against(own, other, "before")[:1] if learns else ()),
                percent([run["after"] for run in own.values()], spread=True),
                *against(own, other),
            ]
            if paper:
                row.append(f"{PAPER[variant]:+.2f}" if variant in PAPER and removed == 0.5773 else "")
            rows.append(row)
    return markdown([*head, "the paper"] if paper else head, rows)


def base_of(ablation, variant):
    """The variant that another one is held against; the orders of a power are held against each other."""
    return variant.replace("batch", "image") if ablation == "order" else BASE[ablation]


def rewinding(stored):
    """Accuracy and distance for each epoch that was rewound to, held against the one nearest to 75 % of training."""
    epochs = stored["settings"]["epochs"]
    runs = stored["runs"]
    nearest = min(unique(runs, "epoch"), key=lambda epoch: abs(epoch / epochs - 0.75))
    base = by_seed(runs, f"epoch {nearest}, weights kept")
    head = [
        "rewound to epoch",
        "weights",
        "epochs retrained",
        "accuracy before retraining",
        "after",
        "against the unpruned network, points",
        f"against epoch {nearest}, weights kept, points",
        "told apart",
        "L2 distance",
    ]
    rows = []
    for variant in unique(runs, "variant"):
        own = by_seed(runs, variant)
        first = next(iter(own.values()))
        distances = [run["distance"] for run in own.values()]
        rows.append(
            [
                f"{first['epoch']} of {epochs} ({first['epoch'] / epochs:.0%})",
                first["weights"],
                str(epochs - first["epoch"]),
                percent([run["before"] for run in own.values()]),
                percent([run["after"] for run in own.values()], spread=True),
                points([run["after"] - run["dense"] for run in own.values()]),
                *against(own, base),
                f"{mean(distances):.2f}{plus_minus(deviation(distances), '.2f')}",
            ]
        )
    return markdown(head, rows)


def stability(stored):
    """Rank correlation and overlap of the lowest scores, for every layer and every pair of inputs."""
    runs = stored["runs"]
    variants = unique(runs, "variant")
    rows = []
    for layer in unique(runs, "layer"):
        of_layer = [run for run in runs if run["layer"] == layer]
        row = [layer or "the network: the same filters removed", str(of_layer[0]["filters"])]
        for variant in variants:
            own = [run for run in of_layer if run["variant"] == variant]
            if layer is None:
                row.append(f"{mean([run['same'] for run in own]):.0%}")
                continue
            known = [run["correlation"] for run in own if run["correlation"] is not None]
            row.append(f"{mean(known):.2f}, {mean([run['lowest'] for run in own]):.0%}" if known else "no spread")
        rows.append(row)
    return markdown(["layer", "filters", *variants], rows)


def widths(stored):
    """The filters that stay in each layer: means over the seeds."""
    runs = stored["runs"]
    columns = [(removed, variant) for removed in unique(runs, "removed") for variant in unique(runs, "variant")]
    rows = []
    for layer in runs[0]["widths"]:
        row = [layer]
        for removed, variant in columns:
            left = [run["widths"][layer] for run in runs if (run["removed"], run["variant"]) == (removed, variant)]
            row.append(f"{mean(left):.0f}")
        rows.append(row)
    head = [f"{variant}, {percent([removed])}" for removed, variant in columns]
    return markdown(["filters left in layer", *head], rows)


def facts(stored):
    """The sentence below a table: what was trained, on what, and where."""
    settings, machine, runs = stored["settings"], stored["machine"], stored["runs"]
    seeds = unique(runs, "seed")
    dense = {run["seed"]: run["dense"] for run in runs if "dense" in run}
    trained = f", unpruned accuracy {percent(list(dense.values()), spread=True)}" if dense else ""
    if stored["ablation"].startswith("paam"):
        trained = f", scores learned for {settings['learn']} epochs{trained}"
    rewound = round(settings["rewind"] * settings["epochs"])
    retrained = "" if stored["ablation"] in ("rewinding", "stability") else f", retrained from epoch {rewound}"
    images = f"{settings['train']:,} training images" + (f" and {settings['test']:,} test images" if dense else "")
    return (
        f"{settings['network']} ({settings['params']:,} parameters) on {settings['data']}, {images}, "
        f"{settings['epochs']} epochs{retrained}; seeds {', '.join(map(str, seeds))}{trained}; {machine['device']}, "
        f"{machine['threads']} CPU threads, torch {machine['torch']}, {machine['date']}."
    )


def against(own, base, key="after"):
    """The cells for the paired differences of two variants: their mean and 95 % interval, and whether it excludes 0."""
    if own == base:
        return "", ""
    differences = [run[key] - base[seed][key] for seed, run in own.items()]
    known = len(differences) > 1
    return points(differences), ("yes" if told_apart(differences) else "no") if known else "one seed"


def by_seed(runs, variant):
    """The runs of a variant: seed -> run."""
    return {run["seed"]: run for run in runs if run["variant"] == variant}


def unique(runs, key):
    """The values of a key, in the order of first appearance."""
    return list(dict.fromkeys(run[key] for run in runs))


def percent(shares, spread=False):
    """The mean of shares as a percentage; with `spread` also the standard deviation over the seeds."""
    return f"{mean(shares):.2%}".replace("%", " %") + (
        plus_minus(deviation(shares) and 100 * deviation(shares), ".2f") if spread else ""
    )


def points(differences):
    """The mean of differences of accuracies in points, and half the width of its 95 % interval."""
    half = interval(differences)
    return f"{100 * mean(differences):+.2f}{plus_minus(None if half is None else 100 * half, '.2f')}"


def spanned(values, shape=".2g"):
    """The mean of a few values and their range; nothing where there are none."""
    if not values:
        return ""
    low, high = f"{min(values):{shape}}", f"{max(values):{shape}}"
    return low if low == high else f"{mean(values):{shape}} ({low} to {high})"


def whole(values):
    """The same in whole numbers."""
    return spanned(values, ".0f")


def share(values):
    """The mean of shares, or nothing where there are none."""
    return percent(values) if values else ""


# What the runs of some ablations have besides: key -> (head of the column, the cell from the values of all seeds).
LEARNED = {
    "thinnest": ("thinnest layer keeps", share),
    "lambda": ("λ at the end", spanned),
    "threshold": ("threshold", spanned),
    "milliseconds": ("ms a step", whole),
    "gradient": ("first gradient differs by", spanned),
    "difference": ("scores differ by", spanned),
    "same": ("kept sets in common", share),
    "scored": ("accuracy with scores", share),
    "kendall before": ("τ when elected", spanned),
    "kendall": ("τ when learned", spanned),
    "overlap before": ("overlap when elected", share),
    "overlap": ("overlap when learned", share),
    "whole": ("accuracy before the cut", share),
}


def plus_minus(value, shape):
    return "" if value is None else f" ± {value:{shape}}"


def markdown(head, rows):
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    sys.exit(main())
