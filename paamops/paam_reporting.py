"""The report of a run of PAAM: one self-contained HTML file, its figures inline SVG."""

import datetime
import math

import numpy as np
import torch

from paamops import pages
from paamops.drawing import (
    BLUE,
    DARK,
    GREEN,
    LIGHT,
    ORANGE,
    logarithmic,
    new_figure,
    require_matplotlib,
    ruled,
    sparsity,
    style,
    svg,
)
from paamops.pages import (
    UNITS,
    accuracy_text,
    asked_text,
    before_and_after,
    budget,
    flops_text,
    percent,
    whole_and_chosen,
    width_rows,
    widths,
)

BINS = 50
SMALL = 0.05  # a lower threshold is shown on logarithmic axes
POINTS = 150  # of the cumulative curve: each is the exact cost of a network
LINES = 150  # of the figure of the learning


def write(result, path, rows=None, command=None):
    """Write the report of `result` to the file `path`, whole or not at all. A symbolic link is followed.

    Args:
        result: paamops.methods.paam_run.PAAMResult.
        rows: lines (what, before, after, change) of the first table; default accuracy, parameters, FLOPs, filters.
        command: the command that made it, to be shown.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: the folder of `path` is not there. ValueError: `path` is no regular file, or a line of
            `rows` has not four entries.
    """
    pages.write(path, lambda: page(result, rows, command, datetime.date.today()))


def page(result, rows, command, date):
    """The HTML of the report: the same characters for the same arguments."""
    require_matplotlib()
    return pages.render(
        "paam_report.html",
        result.dense,
        result.message,
        before_and_after(result, *whole_and_chosen(result)) if rows is None else rows,
        command,
        date,
        lambda: draw(result),
        widths=width_rows(widths(result)),
        asked=asked_text(result.channels, result.budget),
        met=True,
        chosen=result.chosen,
        rounds=[round_row(result, each) for each in result.history],
        unit=UNITS[next(iter(result.budget))],
        threshold=number_text(result.threshold),
        sets=int((~result.channels.pinned).sum()),
        lines=len(drawn(result)),
    )


# --- the words and numbers


def number_text(value):
    return f"{value:.3g}" if math.isfinite(value) else "none"


def round_row(result, each):
    whole, unpruned = result.channels.cost(), each.number == 0
    return (
        each.number,
        *(
            ("–",) * 3
            if unpruned
            else (number_text(each.threshold), f"{each.penalty:.3g}", f"{100 * each.changed:.1f} %")
        ),
        f"{each.params:,} ({percent(each.params, whole.params)})",
        f"{flops_text(each.flops)} ({percent(each.flops, whole.flops)})",
        f"{each.filters:,}",
        accuracy_text(result, each.accuracy),
        "–" if unpruned else accuracy_text(result, each.scored),
        f"{each.seconds:,.1f}",
    )


# --- the figures


def draw(result):
    """The figures of the report by name, as SVG."""
    with style():
        figures = {"scores": scores(result), "learning": learning(result), "sparsity": sparsity(widths(result))}
        return {name: svg(figure, name) for name, figure in figures.items()}


def scores(result):
    """The pooled histogram of all scores, and below it the cumulative curve with the budget and the threshold."""
    from matplotlib.ticker import MaxNLocator

    values = result.scores.double().numpy()
    channels = result.channels
    stays = channels.check(result.keep)[channels.sets].numpy()
    pinned = channels.pinned[channels.sets].numpy()
    low, high, small = score_range(values, result.threshold)
    edges = (np.geomspace if small else np.linspace)(low, high, BINS + 1)
    with style():
        figure, (above, below) = new_figure(330, 2)
        bottom = np.zeros(BINS)
        parts = (("removed", ~stays, ORANGE), ("stays", stays & ~pinned, BLUE), ("pinned", pinned, LIGHT))
        for label, mine, colour in parts:
            if mine.any():
                counts = np.histogram(np.clip(values[mine], low, high), edges)[0]
                above.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=colour, label=label)
                bottom = bottom + counts
        above.set_ylabel("filters")
        above.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        name, limit, whole = budget(channels, result.budget)
        x, removed = curve(channels, channels.set_scores(result.scores), name, low)
        below.step([*x, high], [*removed, removed[-1]], where="post", color=DARK, lw=1.4)
        below.axhline(100 * (1 - limit / whole), color=DARK, lw=1, ls=(0, (5, 3)), label="budget")
        below.set_ylim(0, 104)
        below.set_ylabel(f"{UNITS[name]}\nremoved (%)")
        below.set_xlabel("score of a filter")
        margin = 0.01 * (high - low)
        below.set_xlim(low if small else low - margin, high + margin)
        if small:
            logarithmic(below, "x")
        for axis in (above, below):
            if low <= result.threshold <= high:
                axis.axvline(result.threshold, color=GREEN, lw=1.6, label="threshold" if axis is below else None)
            ruled(axis, "y")
        figure.align_ylabels([above, below])
        figure.legend(loc="outside upper center", ncols=3)
        return figure


def score_range(values, threshold):
    """(The lowest, the highest score that is shown, whether on a logarithmic axis).

    0 to 1, but only the upper part where all lie there. Logarithmic around a threshold that stands close to 0; what is
    too small for the axis stands at its left edge.
    """
    high = max(1.0, float(values.max()))
    if 0 < threshold < SMALL * high:
        positive = values[values > 0]
        return max(float(positive.min()), threshold / 1000) / 1.2, 1.2 * high, True
    low = float(values.min())
    return (0.0 if low < 0.5 else max(0.0, low - 0.05 * (high - low) - 1e-3)), high, False


def curve(channels, means, name, low):
    """(Scores, the % of `name` that is gone where the sets up to that score are): at most POINTS, rising, from 0 %."""
    free = means[~channels.pinned].unique()
    if len(free) > POINTS:
        free = free[torch.linspace(0, len(free) - 1, POINTS).round().long()]
    whole, guarded = getattr(channels.cost(), name), channels.guarded(means)
    left = [getattr(channels.cost(guarded | (means > score)), name) for score in free]
    return [low, *free.tolist()], [0.0, *(100 * (1 - each / max(whole, 1)) for each in left)]


def drawn(result):
    """The channel sets whose scores are drawn while they are learned: of those that can go, LINES at most."""
    means = result.channels.set_scores(result.scores)
    free = torch.nonzero(~result.channels.pinned).flatten()
    free = free[means[free].argsort(stable=True)]
    if len(free) > LINES:
        free = free[torch.linspace(0, len(free) - 1, LINES).round().long()]
    return free


def learning(result):
    """The scores while they were learned, a line for each of `drawn`, in the colour of what became of it."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    channels, sets = result.channels, drawn(result)
    first = torch.from_numpy(np.unique(channels.sets.numpy(), return_index=True)[1])[sets]
    heights, steps = result.learning[:, first].double().numpy(), result.steps.double().numpy()
    steps = steps - steps[0] + 1
    stays = channels.check(result.keep)[sets].numpy()
    with style():
        figure, (axis,) = new_figure(230)
        handles = []
        for label, mine, colour in (("removed", ~stays, ORANGE), ("stays", stays, BLUE)):
            if not mine.any():
                continue
            lines = [np.column_stack([steps, line]) for line in heights.T[mine]]
            axis.add_collection(LineCollection(lines, colors=colour, linewidths=0.7, alpha=0.35))
            handles.append(Line2D([], [], color=colour, lw=1.4, label=label))
            if len(steps) == 1:
                axis.plot([steps[0]] * len(lines), heights[0][mine], ".", color=colour, ms=4)
        if math.isfinite(result.threshold):
            handles.append(axis.axhline(result.threshold, color=GREEN, lw=1.6, label="threshold"))
        axis.set_xlim(1, max(steps[-1], 2))
        low, _, small = score_range(heights, result.threshold)
        axis.set_ylim(low if small else 0, 1.04 * max(1.0, heights.max(), min(result.threshold, 2)))
        if small:
            logarithmic(axis, "y")
        axis.set_xlabel("step of the learning")
        axis.set_ylabel("score")
        ruled(axis, "y")
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        return figure
