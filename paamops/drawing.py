"""What the figures of all reports share: their style, the layers' widths, inline SVG. matplotlib is imported late."""

import contextlib
import io
import re
import warnings
from xml.etree import ElementTree

import numpy as np

# Told apart by those who are colour-blind (Okabe and Ito), and by shape or place as well.
BLUE, ORANGE, GREEN, GREY, LIGHT, DARK = "#0072b2", "#d55e00", "#009e73", "#6b6b6b", "#c4c4c4", "#1a1a1a"

NUMBERED = "layer, numbered as in the table"

WIDTH = 420  # of every figure, in points: its text stays readable on a telephone

STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that the layout is the same everywhere
    "font.size": 11,
    "axes.labelsize": "medium",
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in the name of a layer is a "$"
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "paamops",  # same figure, same ids
}


def require_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reports and plots need matplotlib, which is not installed: pip install paamops[train]", name="matplotlib"
        ) from error


@contextlib.contextmanager
def style():
    """matplotlib as it is out of the box, with STYLE; the user's own settings are put back afterwards."""
    require_matplotlib()
    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True), warnings.catch_warnings():
        # A name may have letters that matplotlib's font lacks; the browser finds them.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def blank_figure(height):
    """A Figure that no backend knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor="white")


def new_figure(height, panels=1):
    """A Figure and its axes one above the other."""
    figure = blank_figure(height)
    return figure, figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]


def ruled(axis, which):
    """Faint lines across the x or y axis, behind all else."""
    axis.grid(axis=which, color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)


def logarithmic(axis, which):
    """A logarithmic x or y axis with plain numbers; its limits have been set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = getattr(axis, f"get_{which}lim")()
    getattr(axis, f"set_{which}scale")("log")
    along = getattr(axis, f"{which}axis")
    along.set_major_locator(LogLocator(subs=(1,) if high / low > 100 else (1, 2, 5)))
    along.set_minor_locator(NullLocator())
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def marker_size(count):
    return min(6, max(3.5, 260 / count))


def sparsity(layers):
    """The share of filters removed from every layer of `pages.widths`, in layer order (AAP's Fig. 2c)."""
    figure, (axis,) = new_figure(190)
    draw_sparsity(figure, axis, layers)
    axis.set_xlabel(NUMBERED)
    return figure


def draw_sparsity(figure, axis, layers):
    numbers = np.arange(1, len(layers) + 1)
    removed = np.array([100 * (before - after) / max(before, 1) for _, _, before, after, _ in layers])
    axis.bar(numbers, removed, width=0.8, color=BLUE)
    pinned = numbers[[pinned for *_, pinned in layers]]
    if len(pinned):
        size = marker_size(len(layers))
        axis.plot(pinned, [0] * len(pinned), "x", color=ORANGE, ms=size, clip_on=False, label="pinned: cannot go")
        figure.legend(loc="outside upper right")
    axis.set_ylim(0, 100)
    axis.set_xlim(0.3, len(layers) + 0.7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("filters removed (%)")
    ruled(axis, "y")


def steps(parts):
    """One Path of all the (top, bottom, edges), (BINS,) each, where top and bottom differ."""
    from matplotlib.path import Path

    vertices, codes = [], []
    for top, bottom, edges in parts:
        filled = np.flatnonzero(top != bottom)
        for run in np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1):
            if not len(run):
                continue
            x = np.repeat(edges[run[0] : run[-1] + 2], 2)[1:-1]
            outline = [*zip(x, np.repeat(top[run], 2), strict=True)]
            outline += reversed([*zip(x, np.repeat(bottom[run], 2), strict=True)])
            vertices += [*outline, outline[0]]
            codes += [Path.MOVETO, *[Path.LINETO] * (len(outline) - 1), Path.CLOSEPOLY]
    return Path(np.array(vertices).reshape(-1, 2), codes)


def shortened(name, most=22):
    """The end of a name says more than its beginning."""
    return name if len(name) <= most else "…" + name[1 - most :]


def svg(figure, name):
    """The figure as an <svg> element for HTML.

    Every id starts with `name`, so that no two figures share one; what only a file of its own needs is gone
    (namespaces, metadata, a style sheet that would hold for the whole page); it scales; coordinates are to 1/100 point.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = local(element.tag)
        if element.tag != "text":
            element.text = None
        element.tail = None
        element.attrib = {local(key): value for key, value in element.attrib.items()}
        if element.tag == "image":
            element.attrib.pop("id", None)  # it is drawn from the pixels, so that two alike would share it
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-")
            elif key == "d":
                value = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 2):g}", " ".join(value.split()))
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-caption")
    return ElementTree.tostring(root, encoding="unicode")


def local(name):
    """The name without its namespace."""
    return name.rpartition("}")[2]
