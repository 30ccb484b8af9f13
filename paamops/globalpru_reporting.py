"""The report of a run of GlobalPru: one self-contained HTML file, its figures inline SVG."""

import datetime
import math
from dataclasses import dataclass

import numpy as np
import torch

from paamops import excitation, pages
from paamops.drawing import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    LIGHT,
    NUMBERED,
    ORANGE,
    blank_figure,
    draw_sparsity,
    logarithmic,
    marker_size,
    new_figure,
    require_matplotlib,
    ruled,
    shortened,
    style,
    svg,
)
from paamops.pages import (
    accuracy_text,
    asked_text,
    before_and_after,
    flops_text,
    percent,
    printable,
    width_rows,
    widths,
)

STAGES = {
    "warm": "warm-up, election",
    "ranked": "learning to rank",
    "pruned": "removal",
    "tuned": "fine-tuning",
}
PICTURES, COLUMNS = 6, 3  # of votes in one figure
CELLS = 64  # a side of a picture at most: a cell of more channels stands for several ranks
LINES = tuple(zip((BLUE, ORANGE, GREEN, DARK, "#cc79a7", "#e69f00"), "osD^vP", strict=True))  # of the curve


def write(result, path, rows=None, command=None, curve=None):
    """Write the report of `result` to the file `path`, whole or not at all. A symbolic link is followed.

    Args:
        result: paamops.methods.globalpru_run.GlobalPruResult.
        rows: lines (what, before, after, change) of the first table; default accuracy, parameters, FLOPs: those before
            the removal, the ranking learned, and those of the fine-tuned network.
        command: the command that made it, to be shown.
        curve: accuracy over pruning rates to draw (the paper's Figure 2), name -> list of (rate, accuracy), rates in
            [0, 1). Several accuracies at one rate, those of several seeds, are joined by their mean.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: the folder of `path` is not there. ValueError: `path` is no regular file, a line of `rows`
            has not four entries, or `curve` holds what is no (rate, accuracy).
    """
    pages.write(path, lambda: page(result, rows, command, curve, datetime.date.today()))


def page(result, rows, command, curve, date):
    """The HTML of the report: the same characters for the same arguments."""
    require_matplotlib()
    points, layers, held = checked_curve(curve), shown(result), elections(result)
    parts = ["; ".join(", ".join(map(str, each.layers)) for each in part) for part in shared_out(held)]
    _, ranked, _, tuned = result.history
    return pages.render(
        "globalpru_report.html",
        result.whole,
        result.message,
        before_and_after(result, ranked, tuned, ("params", "flops")) if rows is None else rows,
        command,
        date,
        lambda: draw(result, points, layers, held),
        widths=layer_rows(result, layers),
        asked=asked(result),
        met=True,
        stages=[stage_row(result, stage) for stage in result.history],
        last=STAGES["tuned"],
        curve=bool(points),
        spread=any(len(values) > 1 for found in points.values() for values in found.values()),
        curve_head=["rate", *points],
        curve_rows=curve_rows(points),
        dashed="rate" in result.asked,
        traces=result.traces is not None,
        missed=result.traces is not None and bool((result.traces <= 0).any()),
        agreement=agreement_rows(result),
        images=min(held, key=lambda each: each.images).images,
        elections=len(held),
        coarse=any(len(each.votes) > CELLS for each in held),
        drawn=min(PICTURES, len(held)),
        parts=parts,
    )


# --- the words and numbers


def asked(result):
    """What was asked for as a sentence."""
    if "rate" not in result.asked:
        mixed = ", at mixed rates" if result.mode == "mixed" else ""
        return asked_text(result.channels, result.asked) + mixed
    rate = percent(result.asked["rate"], 1)
    if result.mode == "mixed":
        return f"the best accuracy without {rate} of the channels of the layers on average, at mixed rates"
    return f"the best accuracy without {rate} of the channels of each layer"


def number_text(value, digits=3):
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def share_text(value):
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def stage_row(result, stage):
    whole = result.history[0]
    return (
        STAGES[stage.name],
        f"{stage.params:,} ({percent(stage.params, whole.params)})",
        f"{flops_text(stage.flops)} ({percent(stage.flops, whole.flops)})",
        accuracy_text(result, stage.accuracy),
        number_text(stage.kendall),
        share_text(stage.overlap),
        f"{stage.seconds:,.1f}",
    )


def hidden(result):
    """The names of the layers of the excitations, which the tables and figures leave out."""
    places = [f"{path}.excitation".removeprefix(".") for path in excitation.excitations(result.whole)]
    return {f"{place}.{part}" for place in places for part in ("reduce", "expand")}


def shown(result):
    """The other layers, as `pages.widths` gives them."""
    return widths(result, hidden(result))


def numbers(result):
    """The numbers, from 1, of the ranked convolutions among the layers that are shown."""
    out = hidden(result)
    names = [layer.name for layer in result.channels.layers if layer.name not in out]
    found = {name: number for number, name in enumerate(names, 1)}
    return [found[name] for name in result.layers]


def layer_rows(result, layers):
    """The lines of the table of the layers, at their end the mean Hessian trace where rates are mixed."""
    rows = width_rows(layers)
    if result.traces is None:
        return rows
    found = dict(zip(numbers(result), result.traces.tolist(), strict=True))
    return [(*row, f"{found[row[0]]:.3g}" if row[0] in found else "–") for row in rows]


def agreement_rows(result):
    """For every ranked layer: its number and name, τ and overlap when elected and when taught, chance, votes met."""
    kept = (1 - result.rates).tolist()
    kendall, overlap = result.kendall.T.tolist(), result.overlap.T.tolist()
    rows = []
    for k, number in enumerate(numbers(result)):
        votes, ranking = result.votes[k].cpu(), result.rankings[k].cpu()
        met = int(votes[ranking, torch.arange(len(ranking))].sum()) / max(int(votes.sum()), 1)
        values = (*map(number_text, kendall[k]), *map(share_text, (*overlap[k], kept[k], met)))
        rows.append((number, printable(result.layers[k]), *values))
    return rows


@dataclass(frozen=True)
class Election:
    """One election: the layers (by number) that held it together, the name of the first, its votes (C, C) in the order
    of the elected ranking, how many channels are kept, and how many images voted."""

    layers: tuple
    name: str
    votes: np.ndarray
    kept: int
    images: int


def elections(result):
    """Those of all layers. Layers whose channels are the same sets hold one: an image votes once for each of them."""
    channels = result.channels
    places = {layer.name: number for number, layer in enumerate(channels.layers)}
    held = {}
    for k, number in enumerate(numbers(result)):
        place = places[result.layers[k]]
        sets = channels.sets[channels.offsets[place] : channels.offsets[place + 1]]
        held.setdefault(tuple(sets.tolist()), []).append((k, number))
    found = []
    for members in held.values():
        k = members[0][0]
        ranking, votes = result.rankings[k].cpu(), result.votes[k].cpu()
        votes = votes[ranking].double().numpy()
        images = round(votes.sum() / len(votes) / len(members))
        kept = round((1 - float(result.rates[k])) * len(votes))
        found.append(Election(tuple(n for _, n in members), printable(result.layers[k]), votes, kept, images))
    return found


def shared_out(held):
    """The elections of each figure: the first has up to PICTURES of them chosen evenly, the others have the rest."""
    chosen = np.unique(np.linspace(0, len(held) - 1, min(PICTURES, len(held))).round().astype(int)).tolist()
    rest = [each for number, each in enumerate(held) if number not in chosen]
    return [[held[k] for k in chosen], *(rest[k : k + PICTURES] for k in range(0, len(rest), PICTURES))]


def checked_curve(curve):
    """{name: {rate: [accuracies]}}, rates rising; {} for None. ValueError: a point is no (rate, accuracy)."""
    found = {}
    for name, points in (curve or {}).items():
        places = {}
        for point in points:
            try:
                rate, accuracy = map(float, point)
                good = 0 <= rate < 1 and math.isfinite(accuracy)
            except (TypeError, ValueError):
                good = False
            if not good:
                raise ValueError(f"curve[{name!r}] holds {point!r}; it must hold (rate in [0, 1), accuracy)")
            places.setdefault(rate, []).append(accuracy)
        if places:
            found[printable(name)] = dict(sorted(places.items()))
    return found


def curve_scale(points):
    """100 where all accuracies are fractions, which are told as percentages; else 1."""
    return 100 if all(0 <= a <= 1 for found in points.values() for values in found.values() for a in values) else 1


def curve_rows(points):
    """For every rate the mean accuracy of each line, its range behind it where there were several."""
    scale = curve_scale(points)

    def text(values):
        if not values:
            return "–"
        low, high, mean = (scale * each for each in (min(values), max(values), sum(values) / len(values)))
        unit = " %" if scale == 100 else ""
        return f"{mean:.2f}{unit}" + (f" ({low:.2f} to {high:.2f})" if len(values) > 1 else "")

    rates = sorted({rate for found in points.values() for rate in found})
    return [(f"{100 * rate:.4g} %", *(text(found.get(rate)) for found in points.values())) for rate in rates]


# --- the figures


def draw(result, points, layers, held):
    """The figures of the report by name, as SVG."""
    with style():
        figures = {"sparsity": rates(result, layers), "agreement": agreement(result, layers)}
        if points:
            figures["curve"] = over_rates(points)
        top = max(coarse(each.votes).max() for each in held) or 1.0
        for number, part in enumerate(shared_out(held), 1):
            figures[f"votes-{number}"] = votes(part, top)
        return {name: svg(figure, name) for name, figure in figures.items()}


def over_rates(points):
    """Accuracy over the pruning rate, a line a name through the means; a mark for every point (Fig. 2)."""
    scale = curve_scale(points)
    figure, (axis,) = new_figure(250)
    for number, (name, found) in enumerate(points.items()):
        colour, marker = LINES[number % len(LINES)]
        dashes = ("-", "--", ":")[number // len(LINES) % 3]
        x = [100 * rate for rate in found]
        means = [scale * sum(values) / len(values) for values in found.values()]
        axis.plot(x, means, dashes, color=colour, marker=marker, ms=5, lw=1.4, label=shortened(name, 40))
        each = [(at, scale * value) for at, values in zip(x, found.values(), strict=True) for value in values]
        if len(each) > len(x):
            axis.plot(*zip(*each, strict=True), marker, color=colour, ms=3, alpha=0.5, ls="none")
    axis.set_xlabel("pruning rate (%)")
    axis.set_ylabel("accuracy (%)" if scale == 100 else "accuracy")
    ruled(axis, "y")
    figure.legend(loc="outside upper center", ncols=2 if max(map(len, points)) < 25 else 1)
    return figure


def rates(result, layers):
    """The share of filters removed from every layer; below it the Hessian traces, where rates are mixed."""
    measured = result.traces is not None
    figure, axes = new_figure(330 if measured else 190, 1 + measured)
    draw_sparsity(figure, axes[0], layers)
    if "rate" in result.asked:
        axes[0].axhline(100 * result.asked["rate"], color=DARK, lw=1, ls=(0, (5, 3)))
    if measured:
        draw_traces(axes[1], numbers(result), result.traces.double().cpu().numpy(), len(layers))
        figure.align_ylabels(axes)
    axes[-1].set_xlabel(NUMBERED)
    return figure


def draw_traces(axis, places, traces, count):
    """Mean Hessian traces on a logarithmic axis; one that is not above 0 is an arrowhead at its bottom."""
    places, positive = np.array(places), traces > 0
    low, high = (traces[positive].min(), traces[positive].max()) if positive.any() else (1.0, 1.0)
    low, high = low / 2, 2 * high
    axis.set_ylim(low, high)
    logarithmic(axis, "y")
    size = marker_size(count)
    axis.vlines(places[positive], low, traces[positive], color=LIGHT, lw=1)
    axis.plot(places[positive], traces[positive], "o", color=BLUE, ms=size)
    axis.plot(places[~positive], [low] * int((~positive).sum()), "v", color=ORANGE, ms=size, clip_on=False)
    axis.set_ylabel("mean Hessian\ntrace")
    ruled(axis, "y")


def agreement(result, layers):
    """τ and overlap of each ranked layer, from when it was elected to when it was taught."""
    places, size = np.array(numbers(result)), marker_size(len(layers))
    figure, axes = new_figure(330, 2)
    panels = (
        (result.kendall, "Kendall's τ", 1, torch.zeros(len(places))),
        (result.overlap, "overlap (%)", 100, 1 - result.rates),
    )
    for axis, (values, label, scale, chance) in zip(axes, panels, strict=True):
        elected, taught = (scale * values).double().cpu().numpy()
        chance = scale * chance.double().cpu().numpy()
        axis.hlines(chance, places - 0.35, places + 0.35, color=GREY, lw=1.2, label="by chance")
        axis.vlines(places, elected, taught, color=LIGHT, lw=1.4)
        axis.plot(places, elected, "o", mfc="white", mec=ORANGE, mew=1.3, ms=size + 2.5, label="when elected")
        axis.plot(places, taught, "o", color=BLUE, ms=size, label="when taught")
        low = min(0.0, *(float(each[np.isfinite(each)].min(initial=0)) for each in (elected, taught)))
        axis.set_ylim(low - 0.06 * scale, 1.06 * scale)
        axis.set_ylabel(label)
        ruled(axis, "y")
    axes[-1].set_xlim(0.3, len(layers) + 0.7)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel(NUMBERED)
    figure.align_ylabels(axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def coarse(votes):
    """(at most CELLS) squared: which share of the votes for the channels of a row falls on the ranks of a column.

    Neighbours in the elected ranking share a cell, as many in each but the last.
    """
    starts = np.arange(0, len(votes), -(-len(votes) // CELLS))
    cells = np.add.reduceat(np.add.reduceat(votes, starts, 0), starts, 1)
    return cells / np.maximum(cells.sum(1, keepdims=True), 1)


def votes(part, top):
    """Pictures of elections, a row a channel in the order of the elected ranking, white for no vote, `top` darkest."""
    from matplotlib.colors import PowerNorm

    deep = -(-len(part) // COLUMNS)
    look = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, top), "aspect": "auto", "interpolation": "none"}
    figure = blank_figure(75 + 150 * deep)
    grid = figure.add_gridspec(deep + 1, COLUMNS, height_ratios=[8, *[100] * deep])
    scale = figure.add_subplot(grid[0, :])
    scale.imshow(np.linspace(0, top, 256)[None], extent=(0, 100 * top, 0, 1), **look)
    scale.set_yticks([])
    scale.xaxis.tick_top()
    scale.xaxis.set_label_position("top")
    scale.set_xlabel("share of the votes (%)")
    for number, each in enumerate(part):
        axis = figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS])
        size = len(each.votes)
        axis.imshow(coarse(each.votes), extent=(0, size, size, 0), **look)
        if each.kept < size:
            axis.axhline(each.kept, color=ORANGE, lw=1)
            axis.axvline(each.kept, color=ORANGE, lw=1)
        title = ", ".join(map(str, each.layers))
        axis.set_title(f"{shortened_list(title)}\n{shortened(each.name, 20)}", fontsize=9.5)
        for along in (axis.xaxis, axis.yaxis):
            along.get_major_locator().set_params(integer=True, nbins=4)
        axis.tick_params(labelsize=8.5)
        if number % COLUMNS == 0:
            axis.set_ylabel("elected rank")
        if number + COLUMNS >= len(part):
            axis.set_xlabel("rank")
    return figure


def shortened_list(text, most=20):
    """Its beginning, whole numbers only."""
    return text if len(text) <= most else text[: text[: most - 1].rindex(",") + 1] + " …"
