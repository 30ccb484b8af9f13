"""The report: all of it there, whole HTML that stands alone, the same bytes twice, and what a run can look like."""

import datetime
import html.parser
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import paamops
from paamops.methods.objective import Objective
from paamops.methods.result import Result, Round
from paamops.models import build

pytest.importorskip("matplotlib")
from paamops import reporting

DATE = datetime.date(2026, 11, 21)
NASTY = 'a<b>&"$x$ id="patch_1"'  # markup, mathematics and an id in the name of a layer


class Reader(html.parser.HTMLParser):
    """Collects ids, references, addresses, texts; every tag must be closed, in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.used, self.tags = [], [], [], []
        self.texts, self.attributes, self.headings = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            self.attributes.append((key, value))
            if key == "id":
                self.ids.append(value)
            elif key == "aria-labelledby":
                self.used.append(value)
            elif key == "href":
                self.used.append(value.removeprefix("#"))
            self.used += re.findall(r"url\(#([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def make_result(model, inputs, objective=None, outcomes=("accepted", "rolled back", "skipped", "accepted"), **changes):
    """A run made up: every round accepted removes some more sets; the accuracies are told by the outcome."""
    channels = paamops.trace(model.eval(), inputs)
    before = torch.rand(len(channels.sets)) + 0.01
    means, whole = channels.set_scores(before), channels.cost()
    keep = torch.ones(len(channels.pinned), dtype=torch.bool)
    rounds = [Round(0, None, 0.0, 0.01, whole.params, whole.flops, whole.filters, 0.9284, "start", 60.0)]
    chosen, step = 0, 0.01
    for number, outcome in enumerate(outcomes, 1):
        trial = channels.guarded(means) | (means > means.quantile(min(0.9, 0.15 * number)))
        cost = channels.cost(trial)
        accuracy = {"accepted": 0.925, "rolled back": 0.75}.get(outcome)
        rounds.append(Round(number, chosen, 0.02, step, cost.params, cost.flops, cost.filters, accuracy, outcome, 12.5))
        if outcome == "accepted":
            chosen, keep = number, trial
    after = torch.where(keep[channels.sets], before * 1.1, math.nan)
    lines = torch.full((len(channels.layers),), 0.2, dtype=torch.float64)
    fields = {
        "model": model,
        "dense": model,
        "met": chosen > 0,
        "message": "Round 4 is within the limit; the size no longer changes.",
        "objective": objective or Objective(max_accuracy_drop=0.01),
        "history": tuple(rounds),
        "chosen": chosen,
        "channels": channels,
        "keep": keep,
        "attention": {"before": before, "after": after},
        "thresholds": {"before": lines, "after": 2 * lines},
    }
    return Result(**fields | changes)


def small_network(name="first", last=4):
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 8, 3))
    model.add_module("relu", nn.ReLU())
    model.add_module("one", nn.Conv2d(8, 1, 3))
    model.add_module("two", nn.Conv2d(1, 6, 3))
    model.add_module("last", nn.Conv2d(6, last, 3))
    return model


def small_result(name="first", **changes):
    return make_result(small_network(name), torch.randn(1, 3, 12, 12), **changes)


def page(result, rows=None, command=None):
    return reporting.page(result, rows, command, DATE)


def test_all_of_it_is_there():
    result = make_result(build("resnet20", in_channels=3, num_classes=10), torch.zeros(1, 3, 32, 32))
    read = Reader(page(result, command="python -m paamops prune"))
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    assert left.params < whole.params
    for wanted in (
        "Automatic attention pruning of resnet20",
        "Asked for: the fewest parameters with at most 1.00 points of accuracy lost on validation images.",
        result.message,
        f"{whole.params:,} {left.params:,} {100 * (left.params - whole.params) / whole.params:+.1f} %",
        "92.84 % 92.50 % -0.34 points",
        f"filters {whole.filters} {left.filters}",
        "4 1 0.02 0.01",
        "accepted, chosen",
        "python -m paamops prune",
        f"paamops {paamops.__version__}, torch {torch.__version__}, 2026-11-21.",
    ):
        assert wanted in read.text
    kept = torch.bincount(result.channels.filters[result.keep[result.channels.sets]])
    for number, (layer, after) in enumerate(zip(result.channels.layers[:-1], kept.tolist()[:-1], strict=True), 1):
        before = int(result.channels.offsets[number] - result.channels.offsets[number - 1])
        assert f"{number} {layer.name} {before} {after} {100 * (before - after) / before:.1f} %" in read.text
        assert f"{number} · {layer.name}" in read.text  # in the figure of the attention
    assert "20 linear 10 10 pinned linear" in read.text
    assert read.tags.count("svg") == read.tags.count("figcaption") == 3
    titles = ("Before and after", "over the rounds", "Layers", "Attention before", "Rounds", "How it was made")
    headings = [read.headings.index(next(each for each in read.headings if title in each)) for title in titles]
    assert headings == [0, 1, 2, 3, 4, 5]


def test_it_stands_alone_and_its_ids_are_unique():
    result = small_result(objective=Objective(max_accuracy_drop=0.01, params=0.5, flops=10_000))
    text = page(result, command="x")
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
    assert read.tags.count("style") == 1  # none from a figure, which would hold for the whole page


def test_text_of_the_user_is_escaped():
    result = small_result(NASTY, message="<script>alert(1)</script> & so on")
    rows = [("<i>what</i>", 1, "2 & 3", None)]
    text = page(result, rows, "prune --out '</code><script>' \udcff\x1b[0m")
    read = Reader(text)
    assert "script" not in read.tags
    assert "i" not in read.tags
    assert "<script>alert(1)</script> & so on" in read.text
    assert "<i>what</i> 1 2 & 3 None" in read.text
    assert f"1 {NASTY}" in read.text  # the table
    assert f"1 · {reporting.shortened(NASTY)}" in read.text  # the figure
    assert "'</code><script>' \ufffd\ufffd[0m" in read.text
    assert len(read.ids) == len(set(read.ids))


def test_the_same_bytes_twice_and_settings_stay_the_users():
    import matplotlib

    result = small_result()
    first = page(result)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None, "axes.grid": True}):
        set_before = matplotlib.rcParams.copy()
        assert page(result) == first
        assert matplotlib.rcParams.copy() == set_before


@pytest.mark.parametrize("name", ["missing/report.html", "."])
def test_a_bad_path_is_told_before_work_is_done(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reporting, "page", lambda *_: pytest.fail("worked first"))
    with pytest.raises((FileNotFoundError, ValueError), match="folder"):
        small_result().report(tmp_path / name)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    result, path = small_result(), tmp_path / "report.html"
    result.report(path, command="first")
    whole = path.read_text(encoding="utf-8")
    assert whole == reporting.page(result, None, "first", datetime.date.today())
    monkeypatch.setattr(reporting, "page", lambda *_: "second")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        result.report(path, command="second")
    assert path.read_text(encoding="utf-8") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_lines_of_the_table_have_four_entries():
    with pytest.raises(ValueError, match=r"rows: .* has 2 entries"):
        page(small_result(), [("accuracy", "90 %")])


def test_a_run_without_an_accepted_round():
    result = small_result(outcomes=("skipped", "rolled back"), objective=Objective(max_accuracy_drop=-0.005))
    read = Reader(page(result))
    assert "with at least 0.50 points of accuracy gained on validation images" in read.text
    assert ("class", "verdict missed") in read.attributes
    assert "objective not met" in read.text  # in the title; beside the message it would be said twice
    params = f"{result.channels.cost().params:,}"
    assert f"parameters {params} {params} +0.0 %" in read.text
    assert "0 – 0 0.01" in read.text
    assert "start, chosen" in read.text


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (Objective(params=0.5), "the best accuracy with at most 50.0 % of the parameters."),
        (
            Objective(params=0.5, flops=0.25),
            "the best accuracy with at most 50.0 % of the parameters and at most 25.0 % of the FLOPs.",
        ),
        (
            Objective(max_accuracy_drop=0, minimise="both"),
            "the fewest parameters and FLOPs with no accuracy lost on validation images.",
        ),
        (
            Objective(max_accuracy_drop=0.01, flops=0.5),
            "a network with at most 50.0 % of the FLOPs and at most 1.00 points of accuracy lost on validation images.",
        ),
    ],
)
def test_what_was_asked(objective, sentence):
    model = build("lenet5", in_channels=1, num_classes=10)
    assert reporting.asked(make_result(model, torch.zeros(1, 1, 28, 28), objective)) + "." == sentence


def lines_of(axis, label):
    return [line for line in axis.get_lines() if line.get_label() == label]


def test_history_tells_the_rounds_apart():
    result = small_result(objective=Objective(max_accuracy_drop=0.01, params=0.5))
    figure = result.plot_history()
    lost, params, flops = figure.axes
    for axis in (lost, params, flops):
        shown = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
        marks = [(shown[name].get_marker(), shown[name].get_color()) for name in shown if name in reporting.OUTCOMES]
        assert len({marker for marker, _ in marks}) == len({colour for _, colour in marks}) == len(marks)
        assert shown["chosen"].get_xdata()[0] == result.chosen == 4
    assert list(lines_of(lost, "accepted")[0].get_xdata()) == [1, 4]
    assert lines_of(lost, "accepted")[0].get_ydata() == pytest.approx([0.34, 0.34])
    assert not lines_of(lost, "skipped")  # not trained, so without accuracy
    assert list(lines_of(params, "skipped")[0].get_xdata()) == [3]
    assert lines_of(lost, "limit")[0].get_ydata() == pytest.approx([1, 1])
    limit = 100 * result.objective.limit("params", result.channels.cost()) / result.channels.cost().params
    assert lines_of(params, "limit")[0].get_ydata() == pytest.approx([limit, limit])
    assert not lines_of(flops, "limit")
    # The round that lost 18 points stands at the top, with its number.
    assert lines_of(lost, "rolled back")[0].get_ydata()[0] < 5
    assert [text.get_text() for text in lost.texts] == ["↑ 17.8"]


def test_a_round_after_a_skipped_one_is_joined_to_the_network_it_was_pruned_from():
    result = small_result()
    outcomes = [(each.number, each.outcome) for each in result.history]
    assert outcomes[1:] == [(1, "accepted"), (2, "rolled back"), (3, "skipped"), (4, "accepted")]
    history = (*result.history[:4], Round(**vars(result.history[4]) | {"origin": 3}))
    for axis in Result(**vars(result) | {"history": history}).plot_history().axes:
        joined = [list(line.get_xdata()) for line in axis.get_lines() if line.get_color() == reporting.LIGHT]
        assert [1, 4] in joined
        assert [3, 4] not in joined


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf])
def test_accuracy_that_is_not_known(accuracy):
    result = small_result()
    history = tuple(Round(**vars(each) | {"accuracy": accuracy}) for each in result.history)
    unknown = Result(**vars(result) | {"history": history})
    assert len(unknown.plot_history().axes) == 2
    read = Reader(page(unknown))
    assert "validation accuracy – – –" in read.text
    one = (*result.history[:2], Round(**vars(result.history[2]) | {"accuracy": accuracy}), *result.history[3:])
    axis = Result(**vars(result) | {"history": one}).plot_history().axes[0]
    assert not lines_of(axis, "rolled back")


def test_accuracies_in_another_unit():
    result = small_result()
    history = tuple(
        Round(**vars(each) | {"accuracy": None if each.accuracy is None else 100 * each.accuracy})
        for each in result.history
    )
    read = Reader(page(Result(**vars(result) | {"history": history, "objective": Objective(max_accuracy_drop=1)})))
    assert "validation accuracy 92.84 92.5 -0.34" in read.text
    assert "at most 1 of accuracy lost" in read.text


def test_attention_counts_every_filter():
    """The areas of a layer's histograms are its filters, before and after."""
    values = torch.tensor([0.0, 1e-30, 0.5, math.nan, 2.0, 2.0]).double().numpy()
    low, high = reporting.attention_range(values, values, [values[:0]])
    edges = torch.logspace(math.log10(low), math.log10(high), reporting.BINS + 1, dtype=torch.float64).numpy()
    counts = reporting.binned(values, edges)
    assert counts.sum() == 5
    assert counts[0] == 2  # zero, and what is too small for the axis
    assert (low, high) == pytest.approx((2e-5 / 1.2, 2.4), rel=1e-6)
    nothing = torch.zeros(3).double().numpy()
    assert reporting.attention_range(nothing, nothing * math.nan, [nothing]) == (0.1, 1.0)


def test_steps_draw_what_is_filled():
    edges = torch.arange(6).double().numpy()
    top, bottom = torch.tensor([0, 2, 1, 0, 3]).numpy(), torch.zeros(5).numpy()
    path = reporting.steps([(top, bottom, edges)])
    assert path.contains_points([[1.5, 1.9], [2.5, 0.9], [4.5, 2.9]]).all()
    assert not path.contains_points([[0.5, 0.1], [2.5, 1.1], [3.5, 0.1]]).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": lambda before, after: {"before": before * 0, "after": after * 0}},
        {"attention": lambda before, after: {"before": before, "after": after * math.nan}},
        {"thresholds": torch.zeros(4, dtype=torch.float64)},
        {"thresholds": torch.tensor([1e-9, 1e9, math.nan, math.inf], dtype=torch.float64)},
    ],
    ids=["zero attention", "all NaN", "no threshold", "far thresholds"],
)
def test_odd_attention_and_layers_of_one_filter(changes):
    result = small_result()
    keep = result.channels.guarded(result.channels.set_scores(result.attention["before"]))  # all but one removed
    fields = vars(result) | {"keep": keep}
    if "attention" in changes:
        fields["attention"] = changes["attention"](*result.attention.values())
    else:
        fields["thresholds"] = {"before": changes["thresholds"], "after": changes["thresholds"]}
    text = page(Result(**fields))
    read = Reader(text)
    assert "1 first 8 1 87.5 %" in read.text
    assert "2 one 1 1 pinned" in read.text
    assert not re.search(r"\b(nan|inf)\b", " ".join(value for key, value in read.attributes if key in ("d", "x", "y")))


def test_many_layers_are_shared_out():
    for count in (1, 20, 34, 35, 110, 1000):
        parts = reporting.attention_parts(count)
        assert [layer for first, last in parts for layer in range(first, last + 1)] == list(range(1, count + 1))
        assert max(last - first + 1 for first, last in parts) <= reporting.ROWS


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_report_only_and_pyplot_never():
    code = (
        "import sys, datetime, paamops, paamops.methods.result, paamops.reporting\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('matplotlib', 'jinja2')])\n"
        "from tests.test_reporting import small_result, page\n"
        "page(small_result())\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True False"]


def test_no_matplotlib_no_report(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = small_result()
    for call in (result.plot_history, lambda: result.report(tmp_path / "report.html")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install paamops\[train\]"):
            call()
    assert not list(tmp_path.iterdir())
