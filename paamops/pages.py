"""What the pages of all reports share: their words and numbers, the templates, the file that is written."""

import math
from importlib import resources

import torch

import paamops
from paamops.saving import destination, partial_file
from paamops.selection import absolute

UNITS = {"params": "parameters", "flops": "FLOPs", "filters": "filters"}


def printable(value):
    """`value` as text without control characters and lone surrogates, which no HTML file can hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))


def finite(accuracy):
    """The accuracy, or None where there is none that could be drawn."""
    return accuracy if accuracy is not None and math.isfinite(accuracy) else None


def fractions(result):
    """Whether `evaluate` gave fractions, which are told as percentages: all its values lie in 0 to 1."""
    known = [each.accuracy for each in result.history if finite(each.accuracy) is not None]
    return all(0 <= accuracy <= 1 for accuracy in known)


def percent(part, whole):
    return f"{100 * part / max(whole, 1):.1f} %"


def flops_text(flops):
    return f"{flops / 1e6:,.2f} M" if flops >= 1e5 else f"{flops:,}"


def accuracy_text(result, accuracy):
    if finite(accuracy) is None:
        return "–"
    return f"{100 * accuracy:.2f} %" if fractions(result) else f"{accuracy:.4g}"


def points_text(result, points, sign=""):
    """A difference of accuracies."""
    if not fractions(result):
        return f"{points:{sign}.4g}"
    return f"{100 * points:{sign}.2f} points"


def whole_and_chosen(result):
    """The first round and the one whose network `result.model` is."""
    return result.history[0], next(each for each in result.history if each.number == result.chosen)


def budget(channels, asked):
    """(What is counted, what may stay of it, how much the whole network has), for `asked` = {"params": 0.5}."""
    ((name, value),) = asked.items()
    whole = getattr(channels.cost(), name)
    return name, absolute(name, value, whole), whole


def asked_text(channels, asked):
    """A budget as a sentence."""
    name, limit, whole = budget(channels, asked)
    return f"the best accuracy with at most {percent(limit, whole)} of the {UNITS[name]}"


def before_and_after(result, start, chosen, sizes=tuple(UNITS)):
    """The default lines of the first table: the accuracies of two rounds, and `sizes` before and after."""
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    lost = loss(start, chosen)
    rows = [
        (
            "validation accuracy",
            accuracy_text(result, start.accuracy),
            accuracy_text(result, chosen.accuracy),
            "–" if lost is None else points_text(result, -lost or 0.0, "+"),
        )
    ]
    for name in sizes:
        before, after = getattr(whole, name), getattr(left, name)
        what, text = ("FLOPs an example", flops_text) if name == "flops" else (UNITS[name], "{:,}".format)
        rows.append((what, text(before), text(after), f"{100 * (after - before) / max(before, 1):+.1f} %"))
    return rows


def loss(start, each):
    """The accuracy lost against round 0, or None where it is not known."""
    if finite(start.accuracy) is None or finite(each.accuracy) is None:
        return None
    return start.accuracy - each.accuracy


def widths(result, hidden=()):
    """For every layer (name, kind, filters before, filters after, whether all of them are pinned); none of `hidden`."""
    channels = result.channels
    keep, count = channels.check(result.keep), len(channels.layers)
    before = torch.bincount(channels.filters, minlength=count).tolist()
    after = torch.bincount(channels.filters[keep[channels.sets]], minlength=count).tolist()
    free = torch.bincount(channels.filters[~channels.pinned[channels.sets]], minlength=count).tolist()
    return [
        (printable(layer.name), layer.kind, b, a, not f)
        for layer, b, a, f in zip(channels.layers, before, after, free, strict=True)
        if layer.name not in hidden
    ]


def width_rows(layers):
    """The lines of the table of the layers, from `widths`."""
    return [
        (number, name, f"{before:,}", f"{after:,}", "pinned" if pinned else percent(before - after, before), kind)
        for number, (name, kind, before, after, pinned) in enumerate(layers, 1)
    ]


def write(path, make):
    """Write the HTML that `make()` returns to the file `path`, whole or not at all. A symbolic link is followed."""
    path = destination(path)
    html = make()
    partial = partial_file(path)
    try:
        partial.write_bytes(html.encode("utf-8"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(template, dense, message, rows, command, date, figures, **values):
    """The HTML of `template`: the same characters for the same arguments.

    dense: the unpruned network, whose name is told. rows: the lines of the first table. figures: a function that
    returns them, called when all else is known to be right. values: what else the template tells.
    """
    import jinja2
    from markupsafe import Markup

    rows = [tuple(map(printable, row)) for row in rows]
    for row in rows:
        if len(row) != 4:
            raise ValueError(f"rows: {row!r} has {len(row)} entries; a line is (what, before, after, change)")
    recipe = getattr(dense, "paamops_recipe", None) or {}
    folder = resources.files("paamops") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        network=printable(recipe.get("name", type(dense).__name__)),
        message=printable(message),
        rows=rows,
        figures={name: Markup(svg) for name, svg in figures().items()},
        command=None if command is None else printable(command),
        versions={"paamops": paamops.__version__, "torch": torch.__version__},
        date=date.isoformat(),
        **values,
    )
