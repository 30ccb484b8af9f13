"""The report of a run of AAP: one self-contained HTML file, its figures inline SVG."""

import datetime
import itertools
import math
import statistics

import numpy as np
import torch

from paamops import pages
from paamops.drawing import (
    BLUE,
    DARK,
    GREY,
    LIGHT,
    ORANGE,
    logarithmic,
    marker_size,
    new_figure,
    require_matplotlib,
    ruled,
    shortened,
    sparsity,
    steps,
    style,
    svg,
)
from paamops.methods import policy
from paamops.pages import (
    UNITS,
    accuracy_text,
    before_and_after,
    flops_text,
    fractions,
    loss,
    percent,
    points_text,
    printable,
    whole_and_chosen,
    width_rows,
    widths,
)

OUTCOMES = {"start": ("D", DARK), "accepted": ("o", BLUE), "rolled back": ("v", ORANGE), "skipped": ("x", GREY)}

ROWS = 34  # layers in one figure of the attention: it fits on a printed page
BINS = 60
DECADES = 5  # of attention that are shown; what is smaller stands at the left edge


def write(result, path, rows=None, command=None):
    """Write the report of `result` to the file `path`, whole or not at all. A symbolic link is followed.

    Args:
        result: paamops.methods.result.Result.
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
        "report.html",
        result.dense,
        result.message,
        before_and_after(result, *whole_and_chosen(result)) if rows is None else rows,
        command,
        date,
        lambda: draw(result),
        widths=width_rows(widths(result)),
        asked=asked(result),
        chosen=result.chosen,
        met=result.met,
        parts=attention_parts(len(result.channels.layers)),
        rounds=[round_row(result, each) for each in result.history],
        limited=result.objective.max_accuracy_drop is not None or bool(result.objective.sizes),
    )


# --- the words and numbers


def asked(result):
    """The objective as a sentence."""
    objective, whole = result.objective, result.channels.cost()
    names = {**UNITS, "both": "parameters and FLOPs"}
    minimise = objective.minimise or (None if objective.sizes else "params")
    drop = objective.max_accuracy_drop
    goal = "the best accuracy" if drop is None else f"the fewest {names[minimise]}" if minimise else "a network"
    limits = [
        f"at most {percent(objective.limit(name, whole), getattr(whole, name))} of the {names[name]}"
        for name in objective.sizes
    ]
    if drop is not None and drop > 0:
        limits.append(f"at most {points_text(result, drop)} of accuracy lost on validation images")
    elif drop is not None:
        gained = f"at least {points_text(result, -drop)} of accuracy gained" if drop else "no accuracy lost"
        limits.append(f"{gained} on validation images")
    return f"{goal} with {' and '.join(limits)}"


def round_row(result, each):
    whole = result.channels.cost()
    return (
        each.number,
        "–" if each.origin is None else each.origin,
        f"{each.threshold:.4g}",
        f"{each.step:.4g}",
        f"{each.params:,} ({percent(each.params, whole.params)})",
        f"{flops_text(each.flops)} ({percent(each.flops, whole.flops)})",
        f"{each.filters:,}",
        accuracy_text(result, each.accuracy),
        f"{each.outcome}, chosen" if each.number == result.chosen else each.outcome,
        f"{each.seconds:,.1f}",
    )


# --- the figures


def draw(result):
    """The figures of the report by name, as SVG."""
    with style():
        figures = {"history": history(result), "sparsity": sparsity(widths(result))}
        for first, last in attention_parts(len(result.channels.layers)):
            figures[f"attention-{first}"] = attention(result, first, last)
        return {name: svg(figure, name) for name, figure in figures.items()}


def history(result):
    """Accuracy lost and size left over the rounds, every round joined to the one that it was pruned from (Fig. 2b)."""
    with style():
        start, _ = whole_and_chosen(result)
        whole, objective = result.channels.cost(), result.objective
        unit, scale = ("points", 100) if fractions(result) else ("in its own unit", 1)
        lost = {each.number: loss(start, each) for each in result.history}
        panels = []
        if any(value is not None for value in lost.values()):
            limit = None if objective.max_accuracy_drop is None else scale * objective.max_accuracy_drop
            values = {number: scale * value for number, value in lost.items() if value is not None}
            panels.append((f"accuracy lost\n({unit})", values, limit))
        for name, label in (("params", "parameters\nleft (%)"), ("flops", "FLOPs\nleft (%)")):
            size = getattr(whole, name)
            limit = 100 * objective.limit(name, whole) / size if name in objective.sizes else None
            panels.append((label, {each.number: 100 * getattr(each, name) / size for each in result.history}, limit))
        figure, axes = new_figure(60 + 130 * len(panels), len(panels))
        for axis, (label, values, limit) in zip(axes, panels, strict=True):
            if label.startswith("accuracy"):
                values = cut(axis, result, values, limit)
            else:
                axis.set_ylim(0, 108)
            draw_rounds(axis, result, values, limit)
            axis.set_ylabel(label)
        axes[-1].set_xlabel("round")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels(axes)
        handles = {}
        for axis in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        handles = {label: handles[label] for label in (*OUTCOMES, "chosen", "limit") if label in handles}
        scale = 6 / marker_size(len(result.history))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, markerscale=scale)
        return figure


def draw_rounds(axis, result, values, limit):
    """The rounds that have a value, in the shape of their outcome; the limit; the chosen round."""
    size = marker_size(len(result.history))
    for each in result.history:
        if each.origin is None:
            continue
        origin = policy.trained(result.history, each.origin)  # a skipped round has no network of its own
        if origin in values and each.number in values:
            axis.plot([origin, each.number], [values[origin], values[each.number]], "-", color=LIGHT, lw=1)
    for outcome, (marker, colour) in OUTCOMES.items():
        numbers = [each.number for each in result.history if each.outcome == outcome and each.number in values]
        if numbers:
            heights = [values[number] for number in numbers]
            axis.plot(numbers, heights, marker, color=colour, ms=size, mew=1.4 if marker == "x" else 0, label=outcome)
    if limit is not None:
        axis.axhline(limit, color=DARK, lw=1, ls=(0, (5, 3)), label="limit")
    if result.chosen in values:
        ring = {"mfc": "none", "mec": DARK, "mew": 1.3, "ms": size + 6}
        axis.plot([result.chosen], [values[result.chosen]], "o", ls="none", label="chosen", **ring)
    ruled(axis, "y")


def cut(axis, result, values, limit):
    """`values`, but a round that lost nearly everything stands at the top, an arrow and its number beside it: it must
    not flatten all others."""
    shown = [values[each.number] for each in result.history if each.outcome == "accepted" and each.number in values]
    shown += [0.0, *([] if limit is None else [limit]), statistics.median(values.values())]
    low = min([*values.values(), *shown])
    span = max(shown) - low
    top = max(shown) + 2 * span
    if span == 0 or max(values.values()) <= top:
        return values
    axis.set_ylim(low - 0.2 * span, top + 0.4 * span)
    for number, value in values.items():
        if value > top:
            axis.annotate(f"↑ {value:.3g}", (number, top), (7, 0), textcoords="offset points", va="center", fontsize=10)
    return {number: min(value, top) for number, value in values.items()}


def attention_parts(count):
    """(first, last) layer, from 1, of every figure of the attention: all of about the same height."""
    parts = max(1, math.ceil(count / ROWS))
    bounds = [round(part * count / parts) for part in range(parts + 1)]
    return [(a + 1, b) for a, b in itertools.pairwise(bounds)]


def attention(result, first, last):
    """The distributions of the attention in the layers first to last: before above the line, after below it (Fig. 9).

    A histogram over log attention, to the height of each layer's fullest bin. Thresholds T·w_l are upright lines.
    """
    from matplotlib.patches import PathPatch

    channels = result.channels
    before, after = (result.attention[when].detach().cpu().double().numpy() for when in ("before", "after"))
    thresholds = [torch.as_tensor(result.thresholds[when]).cpu().numpy() for when in ("before", "after")]
    low, high = attention_range(before, after, thresholds)
    edges = np.geomspace(low, high, BINS + 1)
    gone = ~channels.check(result.keep)[channels.sets].numpy()
    count = last - first + 1
    row = min(36, max(15, 400 / count))
    figure, (axis,) = new_figure(90 + row * count)
    shapes = {"before, stays": [], "before, removed": [], "after": []}
    for y, k in enumerate(range(first - 1, last)):
        mine = slice(int(channels.offsets[k]), int(channels.offsets[k + 1]))
        total, left = binned(before[mine], edges), binned(after[mine], edges)
        stays = binned(before[mine][~gone[mine]], edges)
        unit = 0.44 / max(total.max(), left.max(), 1)
        shapes["before, stays"].append((y - unit * stays, np.full(BINS, y), edges))
        shapes["before, removed"].append((y - unit * total, y - unit * stays, edges))
        shapes["after"].append((y + unit * left, np.full(BINS, y), edges))
    axis.hlines(range(count), low, high, color=LIGHT, lw=0.6)
    for (label, parts), colour in zip(shapes.items(), (LIGHT, ORANGE, BLUE), strict=True):
        path = steps(parts)
        edge = GREY if colour == LIGHT else colour
        axis.add_patch(PathPatch(path, facecolor=colour, edgecolor=edge, lw=0.4, label=label))
    for values, side in zip(thresholds, (-1, 1), strict=True):
        draw_thresholds(axis, values[first - 1 : last], low, high, side)
    axis.plot([], [], "-", color=DARK, lw=1.4, label="threshold of the layer")
    lay_out(axis, low, high, count)
    names = [f"{k} · {shortened(printable(layer.name))}" for k, layer in enumerate(channels.layers, 1)][
        first - 1 : last
    ]
    axis.set_yticks(range(count), names, fontsize=9.5)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def attention_range(before, after, thresholds):
    """The lowest and the highest attention that is shown: DECADES at most, thresholds too where they are near."""
    values = np.concatenate([before, after])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 1.0
    lines = np.concatenate(thresholds)
    lines = lines[np.isfinite(lines) & (lines > 0) & (lines <= 10 * values.max())]
    both = np.concatenate([values, lines])
    high = both.max()
    return max(both.min(), high / 10**DECADES) / 1.2, high * 1.2


def binned(values, edges):
    """(BINS,) how many of `values` lie in each bin; those below the first stand in it, NaN in none."""
    return np.histogram(np.clip(values[np.isfinite(values)], edges[0], edges[-1]), edges)[0]


def draw_thresholds(axis, values, low, high, side):
    """A line in every layer's half row, before (side -1) or after (1); beyond the axis an arrowhead at its edge."""
    y = np.arange(len(values))
    inside = (values >= low) & (values <= high)
    axis.vlines(values[inside], y[inside], (y + 0.46 * side)[inside], color=DARK, lw=1.4)
    for beyond, x, marker in (((values > 0) & (values < low), low, "<"), (values > high, high, ">")):
        at = (y + 0.23 * side)[beyond & np.isfinite(values)]
        if len(at):
            axis.plot([x] * len(at), at, marker, color=DARK, ms=3, clip_on=False)


def lay_out(axis, low, high, count):
    """A logarithmic axis with plain numbers, the first layer on top."""
    axis.set_xlim(low, high)
    logarithmic(axis, "x")
    axis.set_ylim(count - 0.45, -0.55)
    axis.set_xlabel("attention of a filter")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    ruled(axis, "x")
