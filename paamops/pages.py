"""What the pages of all reports share: their words and numbers, the templates, the file that is written."""

import math
from importlib import resources

import torch

import paamops
from paamops.saving import destination, partial_file


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


def before_and_after(result):
    """The default lines of the first table."""
    start, chosen = whole_and_chosen(result)
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
    for what, before, after, text in (
        ("parameters", whole.params, left.params, "{:,}".format),
        ("FLOPs an example", whole.flops, left.flops, flops_text),
        ("filters", whole.filters, left.filters, "{:,}".format),
    ):
        rows.append((what, text(before), text(after), f"{100 * (after - before) / max(before, 1):+.1f} %"))
    return rows


def loss(start, each):
    """The accuracy lost against round 0, or None where it is not known."""
    if finite(start.accuracy) is None or finite(each.accuracy) is None:
        return None
    return start.accuracy - each.accuracy


def widths(result):
    """For every layer (name, kind, filters before, filters after, whether all of them are pinned)."""
    channels = result.channels
    keep, count = channels.check(result.keep), len(channels.layers)
    before = torch.bincount(channels.filters, minlength=count).tolist()
    after = torch.bincount(channels.filters[keep[channels.sets]], minlength=count).tolist()
    free = torch.bincount(channels.filters[~channels.pinned[channels.sets]], minlength=count).tolist()
    return [
        (printable(layer.name), layer.kind, b, a, not f)
        for layer, b, a, f in zip(channels.layers, before, after, free, strict=True)
    ]


def width_row(number, layer):
    name, kind, before, after, pinned = layer
    removed = "pinned" if pinned else percent(before - after, before)
    return number, name, f"{before:,}", f"{after:,}", removed, kind


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


def render(template, result, rows, command, date, figures, **values):
    """The HTML of `template`: the same characters for the same arguments. `values` are what it has beyond base.html."""
    import jinja2
    from markupsafe import Markup

    rows = before_and_after(result) if rows is None else [tuple(map(printable, row)) for row in rows]
    for row in rows:
        if len(row) != 4:
            raise ValueError(f"rows: {row!r} has {len(row)} entries; a line is (what, before, after, change)")
    recipe = getattr(result.dense, "paamops_recipe", None) or {}
    folder = resources.files("paamops") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        network=printable(recipe.get("name", type(result.dense).__name__)),
        message=printable(result.message),
        rows=rows,
        figures={name: Markup(svg) for name, svg in figures().items()},
        widths=[width_row(number, layer) for number, layer in enumerate(widths(result), 1)],
        chosen=result.chosen,
        command=None if command is None else printable(command),
        versions={"paamops": paamops.__version__, "torch": torch.__version__},
        date=date.isoformat(),
        **values,
    )
