"""The report of PAAM: all of it there, whole HTML that stands alone, the same bytes twice, what a run can look like."""

import dataclasses
import datetime
import math
import re
import subprocess
import sys

import pytest
import torch

import paamops
from paamops import paam_reporting, pages
from paamops.methods.paam_run import PAAMResult, PAAMRound
from paamops.models import build
from tests.test_reporting import NASTY, Reader, small_network

pytest.importorskip("matplotlib")

DATE = datetime.date(2026, 11, 21)


def make_result(model, inputs, budget=None, snapshots=5, spread=1.0, **changes):
    """A run made up: scores from 0 to `spread`, those of pinned filters 1, removed up to the budget."""
    channels, budget = paamops.trace(model.eval(), inputs), budget or {"params": 0.5}
    means = torch.where(channels.pinned, 1.0, torch.rand(len(channels.pinned)) * spread)
    scores = means[channels.sets]
    selection = paamops.select(channels, scores, **budget)
    whole, left = channels.cost(), selection.achieved
    rounds = [PAAMRound(0, 0.0, 0.0, 0.0, whole.params, whole.flops, whole.filters, 0.9284, 0.9284, 60.0)]
    for number, accuracy in ((1, 0.93), (2, 0.925)):
        sizes = left.params, left.flops, left.filters
        rounds.append(PAAMRound(number, selection.threshold, 0.0123, 0.25, *sizes, accuracy, 0.9111, 12.5))
    fields = {
        "model": model,
        "dense": model,
        "stable": False,
        "message": "Half is gone; 2 of 2 rounds.",
        "budget": budget,
        "history": tuple(rounds),
        "chosen": 1,
        "channels": channels,
        "keep": selection.keep,
        "scores": scores,
        "threshold": selection.threshold,
        "learning": torch.linspace(0, 1, max(snapshots, 2))[:snapshots, None] * (scores - 1) + 1,
        "steps": torch.arange(snapshots) * 8 + 5,
    }
    return PAAMResult(**fields | changes)


def small_result(name="first", **changes):
    return make_result(small_network(name), torch.randn(1, 3, 12, 12), **changes)


def resnet_result(**changes):
    return make_result(build("resnet20", in_channels=3, num_classes=10), torch.zeros(1, 3, 32, 32), **changes)


def page(result, rows=None, command=None):
    return paam_reporting.page(result, rows, command, DATE)


def test_all_of_it_is_there():
    result = resnet_result()
    read = Reader(page(result, command="python -m paamops prune --method paam"))
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    assert left.params < whole.params
    for wanted in (
        "Pruning of resnet20 by learned scores (PAAM)",
        "Asked for: the best accuracy with at most 50.0 % of the parameters.",
        result.message,
        f"{whole.params:,} {left.params:,} {100 * (left.params - whole.params) / whole.params:+.1f} %",
        "92.84 % 93.00 % +0.16 points",
        f"filters {whole.filters} {left.filters}",
        f"the one threshold of all layers, {result.threshold:.3g}:",
        "0 – – – 269",
        f"1 {result.threshold:.3g} 0.0123 25.0 % {left.params:,} ({100 * left.params / whole.params:.1f} %)",
        "93.00 % 91.11 % 12.5",
        "python -m paamops prune --method paam",
        f"paamops {paamops.__version__}, torch {torch.__version__}, 2026-11-21.",
    ):
        assert wanted in read.text
    kept = torch.bincount(result.channels.filters[result.keep[result.channels.sets]])
    for number, (layer, after) in enumerate(zip(result.channels.layers[:-1], kept.tolist()[:-1], strict=True), 1):
        before = int(result.channels.offsets[number] - result.channels.offsets[number - 1])
        assert f"{number} {layer.name} {before} {after} {100 * (before - after) / before:.1f} %" in read.text
    assert "20 linear 10 10 pinned linear" in read.text
    assert read.tags.count("svg") == read.tags.count("figcaption") == 3
    assert read.headings == [
        "Before and after",
        "Scores and the threshold",
        "Layers",
        "Rounds",
        "How it was made",
    ]
    assert ("class", "verdict") in read.attributes


def test_it_stands_alone_and_its_ids_are_unique():
    text = page(small_result(), command="x")
    read = Reader(text)
    assert "://" not in text
    assert not {"link", "script", "img", "iframe", "image"} & set(read.tags)
    assert not {"src", "xlink:href", "xmlns"} & {key for key, _ in read.attributes}
    assert "@import" not in text
    assert len(read.ids) == len(set(read.ids))
    assert set(read.used) <= set(read.ids)
    assert read.used
    assert ("lang", "en") in read.attributes
    assert ("name", "viewport") in read.attributes
    assert read.tags.count("style") == 1


def test_text_of_the_user_is_escaped():
    result = small_result(NASTY, message="<script>alert(1)</script> & so on")
    read = Reader(page(result, [("<i>what</i>", 1, "2 & 3", None)], "prune --out '</code><script>' \udcff\x1b[0m"))
    assert not {"script", "i"} & set(read.tags)
    for wanted in ("<script>alert(1)</script> & so on", "<i>what</i> 1 2 & 3 None", f"1 {NASTY}"):
        assert wanted in read.text
    assert "'</code><script>' \ufffd\ufffd[0m" in read.text


def test_the_same_bytes_twice():
    import matplotlib

    result = resnet_result()
    first = page(result)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None, "axes.grid": True}):
        assert page(result) == first


@pytest.mark.parametrize("name", ["missing/report.html", "."])
def test_a_bad_path_is_told_before_work_is_done(tmp_path, monkeypatch, name):
    monkeypatch.setattr(paam_reporting, "page", lambda *_: pytest.fail("worked first"))
    with pytest.raises((FileNotFoundError, ValueError), match="folder"):
        small_result().report(tmp_path / name)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    result, path = small_result(), tmp_path / "report.html"
    result.report(path, command="first")
    whole = path.read_text(encoding="utf-8")
    assert whole == paam_reporting.page(result, None, "first", datetime.date.today())
    monkeypatch.setattr(paam_reporting, "page", lambda *_: "second")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        result.report(path, command="second")
    assert path.read_text(encoding="utf-8") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_lines_of_the_table_have_four_entries():
    with pytest.raises(ValueError, match=r"rows: .* has 2 entries"):
        page(small_result(), [("accuracy", "90 %")])


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"flops": 0.25}, "at most 25.0 % of the FLOPs"),
        ({"filters": 0.5}, "at most 50.0 % of the filters"),
        ({"params": 100_000}, "at most 37.1 % of the parameters"),
    ],
)
def test_what_was_asked(budget, sentence):
    result = resnet_result(budget=budget)
    assert pages.asked_text(result.channels, result.budget) == f"the best accuracy with {sentence}"
    unit = sentence.rpartition(" ")[2]
    axis = paam_reporting.scores(result).axes[1]
    assert axis.get_ylabel() == f"{unit}\nremoved (%)"


def test_the_histogram_counts_every_filter_once():
    result = resnet_result()
    above, _ = paam_reporting.scores(result).axes
    stays = result.keep[result.channels.sets]
    pinned = result.channels.pinned[result.channels.sets]
    bars = {bars.get_label(): sum(bar.get_height() for bar in bars) for bars in above.containers}
    assert bars == {"removed": (~stays).sum(), "stays": (stays & ~pinned).sum(), "pinned": pinned.sum()}
    left = {bars.get_label(): max(b.get_x() for b in bars if b.get_height()) for bars in above.containers}
    assert (
        left["removed"]
        <= result.threshold
        <= min(b.get_x() + b.get_width() for b in above.containers[1] if b.get_height())
    )


@pytest.mark.parametrize("budget", [{"params": 0.5}, {"flops": 0.3}, {"filters": 0.7}])
def test_curve_budget_and_threshold_meet(budget):
    """Just before the threshold the network is above the budget, at it within; the curve never falls."""
    result = resnet_result(budget=budget)
    channels, ((name, share),) = result.channels, budget.items()
    x, removed = paam_reporting.curve(channels, channels.set_scores(result.scores), name, 0.0)
    assert (x[0], removed[0]) == (0.0, 0.0)
    assert removed == sorted(removed)
    assert x == sorted(x)
    means = channels.set_scores(result.scores)
    assert len(x) == 1 + min(paam_reporting.POINTS, int((~channels.pinned).sum()))
    for score, gone in zip(x[1:], removed[1:], strict=True):
        left = getattr(channels.cost(channels.guarded(means) | (means > score)), name)
        assert gone == pytest.approx(100 * (1 - left / getattr(channels.cost(), name)))
        if score < result.threshold:
            assert gone < 100 * (1 - share)
        elif score > result.threshold:
            assert gone >= 100 * (1 - share)
    above, below = paam_reporting.scores(result).axes
    lines = {line.get_label(): line for line in below.get_lines()}
    assert lines["budget"].get_ydata() == pytest.approx([100 * (1 - share)] * 2, abs=0.5)
    assert lines["threshold"].get_xdata() == pytest.approx([result.threshold] * 2)
    assert list(above.get_lines()[0].get_xdata()) == pytest.approx([result.threshold] * 2)


def test_lines_of_the_learning():
    result = small_result()
    (axis,) = paam_reporting.learning(result).axes
    channels = result.channels
    free = int((~channels.pinned).sum())
    lines = [segment for group in axis.collections for segment in group.get_segments()]
    assert len(lines) == free
    ends = sorted(line[-1, 1] for line in lines)
    assert ends == pytest.approx(sorted(channels.set_scores(result.scores)[~channels.pinned].tolist()))
    for group, stays in zip(axis.collections, (False, True), strict=True):
        for line in group.get_segments():
            assert line[0].tolist() == [1, 1]  # the first step; every score is 1
            assert line[-1, 0] == 33
            assert (line[-1, 1] > result.threshold) == stays or stays  # a layer's best stays below it too


def test_of_many_sets_some_are_drawn():
    result = resnet_result()
    sets, free = paam_reporting.drawn(result), ~result.channels.pinned
    assert len(sets) == paam_reporting.LINES < free.sum()
    assert free[sets].all()
    means = result.channels.set_scores(result.scores)
    assert (means[sets].min(), means[sets].max()) == (means[free].min(), means[free].max())
    text = Reader(page(result)).text
    assert f"of the {int(free.sum())} sets that can go, {paam_reporting.LINES} are drawn" in text
    assert "are drawn" not in Reader(page(small_result())).text


@pytest.mark.parametrize(
    "changes",
    [
        {"snapshots": 1},
        {"spread": 0.0},
        {"spread": 1e-30},
        {"spread": 3.0},
        {"budget": {"params": 1.0}},
        {"threshold": -math.inf},
        {"threshold": 0.0},
        {"budget": {"filters": 16}},
    ],
    ids=[
        "one snapshot",
        "all at 0",
        "all near 0",
        "above 1",
        "nothing removed",
        "no threshold",
        "threshold 0",
        "one a layer",
    ],
)
def test_odd_runs(changes):
    text = page(small_result(**changes))
    read = Reader(text)
    assert read.tags.count("svg") == 3
    assert not re.search(r"\b(nan|inf)\b", " ".join(value for key, value in read.attributes if key in ("d", "x", "y")))
    if not math.isfinite(changes.get("threshold", 0)):
        assert "the one threshold of all layers, none:" in read.text


def test_scores_that_all_lie_near_one():
    result = small_result()
    high = 0.9 + 0.2 * result.scores
    low, top, small = paam_reporting.score_range(high.double().numpy(), 1.05)
    assert not small
    assert 0.85 < low < high.min()
    assert top == pytest.approx(float(high.max()))
    figure = paam_reporting.scores(dataclasses.replace(result, scores=high, threshold=1.05))
    assert sum(bar.get_height() for bars in figure.axes[0].containers for bar in bars) == len(high)


def test_a_threshold_close_to_0_is_seen():
    """On logarithmic axes; the filters of score 0 are counted too."""
    scores = torch.tensor([0.0, 1e-9, 0.001, 0.002, 0.004, 1.0])
    assert paam_reporting.score_range(scores.double().numpy(), 0.002) == pytest.approx((2e-6 / 1.2, 1.2, True))
    result = small_result(spread=0.01, budget={"filters": 9})
    assert 0 < result.threshold < 0.01
    above, below = paam_reporting.scores(result).axes
    assert (above.get_xscale(), paam_reporting.learning(result).axes[0].get_yscale()) == ("log", "log")
    assert sum(bar.get_height() for bars in above.containers for bar in bars) == len(result.scores)
    low, high = below.get_xlim()
    assert low < result.threshold < high
    assert paam_reporting.scores(small_result()).axes[0].get_xscale() == "linear"
    page(result)


def test_accuracies_in_another_unit():
    result = small_result()
    history = tuple(
        dataclasses.replace(each, accuracy=100 * each.accuracy, scored=100 * each.scored) for each in result.history
    )
    read = Reader(page(dataclasses.replace(result, history=history)))
    assert "validation accuracy 92.84 93 +0.16" in read.text
    assert "93 91.11 12.5" in read.text


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_report_only_and_pyplot_never():
    code = (
        "import sys, paamops, paamops.methods.paam_run, paamops.paam_reporting\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('matplotlib', 'jinja2')])\n"
        "from tests.test_paam_reporting import small_result, page\n"
        "page(small_result())\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True False"]


def test_no_matplotlib_no_report(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install paamops\[train\]"):
        small_result().report(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
