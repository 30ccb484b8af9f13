"""The report of GlobalPru: all of it there, whole HTML that stands alone, the same bytes twice, odd runs."""

import base64
import dataclasses
import datetime
import io
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import paamops
from paamops import globalpru_reporting
from paamops.methods.agreement import agreement
from paamops.methods.globalpru import GlobalPru
from paamops.methods.globalpru_run import GlobalPruResult, Stage
from paamops.models import build
from paamops.ops.vote_ranking import elect, vote_ranking
from tests.methods import trainers
from tests.test_reporting import NASTY, Reader, small_network

pytest.importorskip("matplotlib")

DATE = datetime.date(2026, 11, 21)
IMAGES = 40


def make_result(model, inputs, rate=0.5, noise=0.5, traces=None, asked=None, **changes):
    """A run made up: saliencies drawn around an order of each election, which train on towards it."""
    channels = paamops.trace(model.eval(), inputs)
    places = [n for n, layer in enumerate(channels.layers) if "convolution" in layer.kind]
    rows = [channels.sets[channels.offsets[n] : channels.offsets[n + 1]] for n in places]
    ranked = [k for k, sets in enumerate(rows) if len(sets) > 1 and not channels.pinned[sets].any()]
    places, rows = [places[k] for k in ranked], [rows[k] for k in ranked]
    keys = [tuple(sets.tolist()) for sets in rows]
    order, votes = {}, {}
    for key in keys:
        order.setdefault(key, torch.rand(len(key)))
        votes.setdefault(key, torch.zeros(len(key), len(key), dtype=torch.int64))
    elected = [order[key] + noise * torch.randn(IMAGES, len(key)) for key in keys]
    for key, saliency in zip(keys, elected, strict=True):
        vote_ranking(saliency, votes[key])
    found = {key: elect(each) for key, each in votes.items()}
    keep = torch.ones(len(channels.pinned), dtype=torch.bool)
    for key, ranking in found.items():
        keep[torch.tensor(key)[ranking[max(1, round((1 - rate) * len(ranking))) :]]] = False
    tops = [int(keep[sets].sum()) for sets in rows]
    taught = [order[key] + noise / 4 * torch.randn(IMAGES, len(key)) for key in keys]
    agreed = torch.tensor(
        [
            [agreement(s, found[key], top) for s, key, top in zip(saliencies, keys, tops, strict=True)]
            for saliencies in (elected, taught)
        ],
        dtype=torch.float64,
    )
    means = agreed.mean(1)
    whole, left = channels.cost(), channels.cost(keep)
    fields = {
        "model": model,
        "whole": model,
        "message": "Half is gone.",
        "asked": asked or {"rate": rate},
        "mode": "fixed" if traces is None else "mixed",
        "history": (
            Stage("warm", whole.params, whole.flops, 0.91, *means[0].tolist(), 60.0),
            Stage("ranked", whole.params, whole.flops, 0.9284, *means[1].tolist(), 1234.56),
            Stage("pruned", left.params, left.flops, 0.8111, None, None, 0.25),
            Stage("tuned", left.params, left.flops, 0.93, None, None, 30.0),
        ),
        "channels": channels,
        "keep": keep,
        "layers": tuple(channels.layers[n].name for n in places),
        "votes": [votes[key] for key in keys],
        "rankings": [found[key] for key in keys],
        "rates": 1 - torch.tensor(tops, dtype=torch.float64) / torch.tensor([len(sets) for sets in rows]),
        "traces": None if traces is None else traces(len(places)),
        "kendall": agreed[:, :, 0],
        "overlap": agreed[:, :, 1],
    }
    return GlobalPruResult(**fields | changes)


def small_result(name="first", **changes):
    return make_result(small_network(name), torch.randn(1, 3, 12, 12), **changes)


def resnet_result(**changes):
    return make_result(build("resnet20", in_channels=3, num_classes=10), torch.zeros(1, 3, 32, 32), **changes)


def traces(count):
    return torch.rand(count, dtype=torch.float64) + 0.01


def page(result, rows=None, command=None, curve=None):
    return globalpru_reporting.page(result, rows, command, curve, DATE)


CURVE = {"GlobalPru": [(0.6, 0.918), (0.2, 0.921), (0.4, 0.923), (0.4, 0.925)], "by size <b>": [(0.2, 0.92)]}


def test_all_of_it_is_there():
    result = resnet_result(traces=traces)
    read = Reader(page(result, command="python -m paamops prune --method globalpru", curve=CURVE))
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    tau, overlap = result.kendall.mean(1), 100 * result.overlap.mean(1)
    for wanted in (
        "Pruning of resnet20 by a global channel ranking (GlobalPru)",
        "Asked for: the best accuracy without 50.0 % of the channels of the layers on average, at mixed rates.",
        "Half is gone.",
        f"parameters {whole.params:,} {left.params:,} {100 * (left.params - whole.params) / whole.params:+.1f} %",
        "validation accuracy 92.84 % 93.00 % +0.16 points",
        f"warm-up, election {whole.params:,} (100.0 %)",
        f"91.00 % {tau[0]:.3f} {overlap[0]:.1f} % 60.0",
        f"92.84 % {tau[1]:.3f} {overlap[1]:.1f} % 1,234.6",
        f"removal {left.params:,} ({100 * left.params / whole.params:.1f} %)",
        "93.00 % – – 30.0",
        "rate GlobalPru by size <b> 20 % 92.10 % 92.00 %",
        "40 % 92.40 % (92.30 to 92.50) –",
        "20 linear 10 10 pinned linear –",
        "40 images voted in 12 elections",
        "Votes in 6 of 12 elections, chosen evenly (by layer: 1, 3, 5, 7; 4; 8; 12; 15, 17, 19; 18).",
        "Votes in other elections, part 1 of 1 (by layer: 2; 6; 9, 11, 13; 10; 14; 16).",
        "python -m paamops prune --method globalpru",
        f"paamops {paamops.__version__}, torch {torch.__version__}, 2026-11-21.",
    ):
        assert wanted in read.text
    kept = torch.bincount(result.channels.filters[result.keep[result.channels.sets]]).tolist()
    before = torch.bincount(result.channels.filters).tolist()
    for k, name in enumerate(result.layers):
        rate, trace = 100 * float(result.rates[k]), float(result.traces[k])
        assert f"{k + 1} {name} {before[k]} {kept[k]} {rate:.1f} % convolution {trace:.3g}" in read.text
        votes = result.votes[k][result.rankings[k]].double()
        numbers = (f"{value:.3f}" for value in result.kendall[:, k].tolist())
        shares = (*result.overlap[:, k].tolist(), 1 - float(result.rates[k]), float(votes.trace() / votes.sum()))
        assert f"{k + 1} {name} {' '.join(numbers)} {' '.join(f'{100 * s:.1f} %' for s in shares)}" in read.text
    assert read.tags.count("svg") == read.tags.count("figcaption") == 5
    assert read.tags.count("details") == 1
    assert read.headings == [
        "Before and after",
        "Stages",
        "Accuracy over the pruning rate",
        "Layers and their rates",
        "Agreement of the images",
        "Votes",
        "How it was made",
    ]


def pictures(read):
    """The pixels of all images of the page, in order; each must be a PNG in the page itself."""
    from PIL import Image

    found = []
    for tag, attributes in read.elements:
        if tag == "image":
            kind, _, data = attributes["href"].partition(",")
            assert kind == "data:image/png;base64"
            found.append(np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int))
    return found


class Elements(Reader):
    def __init__(self, text):
        self.elements = []
        super().__init__(text)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        super().handle_startendtag(tag, attributes)


def test_it_stands_alone_and_its_ids_are_unique():
    text = page(resnet_result(noise=0.0, traces=traces), command="x", curve=CURVE)  # pictures that are alike
    read = Elements(text)
    assert "://" not in text
    assert not {"link", "script", "img", "iframe"} & set(read.tags)
    assert not {"src", "xlink:href", "xmlns"} & {key for key, _ in read.attributes}
    assert "@import" not in text
    assert len(read.ids) == len(set(read.ids))
    assert {each for each in read.used if not each.startswith("data:image/png;base64,")} <= set(read.ids)
    assert len(pictures(read)) == 2 + 12  # the scale of each figure, and the elections
    assert set(re.findall(r"url\(([^)]?)", text)) == {"#"}
    assert ("lang", "en") in read.attributes
    assert ("name", "viewport") in read.attributes
    assert read.tags.count("style") == 1


def test_text_of_the_user_is_escaped():
    result = small_result(NASTY, message="<script>alert(1)</script> & so on")
    curve = {"<i>mine</i> $x$": [(0.5, 0.9)]}
    read = Reader(page(result, [("<b>what</b>", 1, "2 & 3", None)], "prune '</code><script>' \udcff\x1b[0m", curve))
    assert not {"script", "i", "b"} & set(read.tags)
    for wanted in ("<script>alert(1)</script> & so on", "<b>what</b> 1 2 & 3 None", f"1 {NASTY}", "<i>mine</i> $x$ 50"):
        assert wanted in read.text
    assert "'</code><script>' \ufffd\ufffd[0m" in read.text


def test_the_same_bytes_twice():
    import matplotlib

    result = resnet_result(traces=traces)
    first = page(result, curve=CURVE)
    settings = {"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None, "image.cmap": "gray", "image.lut": 3}
    with matplotlib.rc_context(settings):
        assert page(result, curve=CURVE) == first


@pytest.mark.parametrize("name", ["missing/report.html", "."])
def test_a_bad_path_is_told_before_work_is_done(tmp_path, monkeypatch, name):
    monkeypatch.setattr(globalpru_reporting, "page", lambda *_: pytest.fail("worked first"))
    with pytest.raises((FileNotFoundError, ValueError), match="folder"):
        small_result().report(tmp_path / name)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    result, path = small_result(), tmp_path / "report.html"
    result.report(path, command="first", curve=CURVE)
    whole = path.read_text(encoding="utf-8")
    assert whole == globalpru_reporting.page(result, None, "first", CURVE, datetime.date.today())
    with pytest.raises(ValueError, match="entries"):
        result.report(path, rows=[("accuracy",)])
    monkeypatch.setattr(globalpru_reporting, "page", lambda *_: "second")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        result.report(path, command="second")
    assert path.read_text(encoding="utf-8") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_lines_of_the_table_have_four_entries():
    with pytest.raises(ValueError, match=r"rows: .* has 2 entries"):
        page(small_result(), [("accuracy", "90 %")])


@pytest.mark.parametrize(
    ("asked", "mode", "sentence"),
    [
        ({"rate": 0.4}, "fixed", "the best accuracy without 40.0 % of the channels of each layer"),
        ({"flops": 0.25}, "fixed", "the best accuracy with at most 25.0 % of the FLOPs"),
        (
            {"params": 0.5},
            "mixed",
            "the best accuracy with at most 49.9 % of the parameters, at mixed rates",
        ),  # 288 of 577
    ],
)
def test_what_was_asked(asked, mode, sentence):
    result = small_result(asked=asked, mode=mode)
    assert globalpru_reporting.asked(result) == sentence
    lines = globalpru_reporting.rates(result, globalpru_reporting.shown(result)).axes[0].get_lines()
    dashed = [line.get_ydata()[0] for line in lines if line.is_dashed()]
    assert dashed == ([40] if "rate" in asked else [])


# --- rates and traces


def test_without_traces_rates_stand_alone():
    result = small_result()
    (axis,) = globalpru_reporting.rates(result, globalpru_reporting.shown(result)).axes
    assert [bar.get_height() for bar in axis.patches] == [50, 0, 50, 0]
    text = Reader(page(result)).text
    assert "Hessian" not in text
    assert "1 first 8 4 50.0 % convolution 2 one 1 1 pinned convolution" in text


@pytest.mark.parametrize(
    "values",
    [[0.001, 3.0], [5.0, 5.0], [-1.0, 2.0], [-1.0, 0.0]],
    ids=["apart", "equal", "one below 0", "none above 0"],
)
def test_traces_stand_above_their_layers(values):
    result = small_result(traces=lambda count: torch.tensor(values, dtype=torch.float64))
    _, axis = globalpru_reporting.rates(result, globalpru_reporting.shown(result)).axes
    assert axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    above, below = axis.get_lines()
    expected = dict(zip((1, 3), values, strict=True))
    assert dict(zip(*above.get_data(), strict=True)) == {x: y for x, y in expected.items() if y > 0}
    assert dict(zip(*below.get_data(), strict=True)) == {x: low for x, y in expected.items() if y <= 0}
    assert all(low < y < high for y in values if y > 0)
    text = Reader(page(result)).text
    assert ("not above 0" in text) == (min(values) <= 0)
    assert f"3 two 6 3 50.0 % convolution {values[1]:.3g}" in text


# --- agreement


def test_agreement_stands_above_its_layers():
    result = small_result(rate=0.25)
    figure = globalpru_reporting.agreement(result, globalpru_reporting.shown(result))
    for axis, values, scale, chance in zip(
        figure.axes, (result.kendall, result.overlap), (1, 100), (torch.zeros(2), 1 - result.rates), strict=True
    ):
        lines = {line.get_label(): line for line in axis.get_lines()}
        for label, mine in zip(("when elected", "when taught"), values, strict=True):
            assert lines[label].get_xdata().tolist() == [1, 3]
            np.testing.assert_allclose(lines[label].get_ydata(), scale * mine)
        chances, joints = (np.array(group.get_segments()) for group in axis.collections)
        np.testing.assert_allclose(chances[:, :, 1], scale * chance[:, None].expand(2, 2))
        np.testing.assert_allclose(chances[:, :, 0].mean(1), [1, 3])
        np.testing.assert_allclose(joints[:, :, 1], scale * values.T)
        low, high = axis.get_ylim()
        assert low < scale * values.min()
        assert scale * values.max() < high


def test_images_that_disagree_are_on_the_axis():
    result = small_result(kendall=torch.tensor([[-0.75, -1.0], [0.0, -0.5]], dtype=torch.float64))
    axis = globalpru_reporting.agreement(result, globalpru_reporting.shown(result)).axes[0]
    assert axis.get_ylim()[0] < -1
    assert "1 first -0.750 0.000" in Reader(page(result)).text


# --- votes


def test_an_election_is_drawn_once():
    """The votes of layers with the same channels are one picture; its rows are in the order of the ranking."""
    result = resnet_result()
    held = globalpru_reporting.elections(result)
    assert [each.layers for each in held][:3] == [(1, 3, 5, 7), (2,), (4,)]
    assert sorted(itertools.chain(*(each.layers for each in held))) == list(range(1, 20))
    assert {each.images for each in held} == {IMAGES}
    for each in held:
        k = each.layers[0] - 1
        votes, ranking = result.votes[k].numpy(), result.rankings[k].tolist()
        assert each.name == result.layers[k]
        assert each.kept == round((1 - float(result.rates[k])) * len(ranking))
        for rank in torch.randint(len(ranking), (5,)).tolist():
            assert each.votes[rank].tolist() == votes[ranking[rank]].tolist()


def test_what_stays_is_above_and_left_of_the_lines():
    result = small_result(rate=0.25)
    _, *axes = globalpru_reporting.votes(globalpru_reporting.elections(result), 1.0).axes
    for axis, size, kept, name in zip(axes, (8, 6), (6, 4), ("first", "two"), strict=True):
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, size), (size, 0))
        assert [line.get_xydata()[0].tolist() for line in axis.get_lines()] == [[0, kept], [kept, 0]]
        assert axis.get_title().endswith(f"\n{name}")


@pytest.mark.parametrize("count", [1, 2, 6, 7, 12, 13, 55])
def test_elections_are_shared_out(count):
    parts = globalpru_reporting.shared_out(list(range(count)))
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(0 < len(part) <= 6 for part in parts)
    assert len(parts[0]) == min(6, count)
    assert (parts[0][0], parts[0][-1]) == (0, count - 1)
    gaps = np.diff(parts[0])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("size", [2, 63, 64, 65, 129, 200])
def test_cells_share_the_votes_of_their_rows(size):
    votes = torch.randint(1, 9, (size, size)).double().numpy()
    cells, block = globalpru_reporting.coarse(votes), -(-size // 64)
    assert cells.shape == (-(-size // block),) * 2
    assert len(cells) <= 64
    np.testing.assert_allclose(cells.sum(1), 1)
    i, j = (int(torch.randint(len(cells), ())) for _ in range(2))
    row = votes[i * block : (i + 1) * block]
    assert cells[i, j] == pytest.approx(row[:, j * block : (j + 1) * block].sum() / row.sum())


def test_agreement_is_a_dark_diagonal():
    """As it stands in the page, pixel by pixel; and rank 0 at the top left."""
    result = small_result(noise=0.0)
    scale, *found = pictures(Elements(page(result)))
    assert scale[0, 0].sum() > scale[0, -1].sum()
    for picture, size in zip(found, (8, 6), strict=True):
        assert picture.shape == (size, size, 3)
        assert (picture[np.eye(size, dtype=bool)] == scale[0, -1]).all()
        assert (picture[~np.eye(size, dtype=bool)] == scale[0, 0]).all()
    votes = [each.clone() for each in result.votes]
    first, second = result.rankings[0][:2].tolist()
    votes[0][first] = votes[0][second]  # the best channel is placed where the second is, by all
    _, picture, _ = pictures(Elements(page(dataclasses.replace(result, votes=votes))))
    assert (picture[0].sum(1).argmin(), picture[1].sum(1).argmin()) == (1, 1)


# --- accuracy over rates


def test_curve_joins_the_means():
    points = globalpru_reporting.checked_curve(CURVE)
    (axis,) = globalpru_reporting.over_rates(points).axes
    joined, each, other = axis.get_lines()
    assert (joined.get_label(), other.get_label()) == ("GlobalPru", "by size <b>")
    np.testing.assert_allclose(joined.get_xydata(), [[20, 92.1], [40, 92.4], [60, 91.8]])
    np.testing.assert_allclose(each.get_xydata(), [[20, 92.1], [40, 92.3], [40, 92.5], [60, 91.8]])
    assert other.get_xydata().tolist() == [[20, 92]]
    assert axis.get_ylabel() == "accuracy (%)"


def test_curve_in_another_unit():
    points = globalpru_reporting.checked_curve({"a": [(0.25, 91.5)], "b": [(0.125, 90.0), (0.25, 0.5)]})
    assert globalpru_reporting.curve_rows(points) == [("12.5 %", "–", "90.00"), ("25 %", "91.50", "0.50")]
    (axis,) = globalpru_reporting.over_rates(points).axes
    assert axis.get_ylabel() == "accuracy"
    assert axis.get_lines()[1].get_ydata().tolist() == [90, 0.5]


def test_lines_of_a_curve_are_told_apart():
    points = globalpru_reporting.checked_curve({f"line {k}": [(0.1, 0.9), (0.2, 0.8)] for k in range(15)})
    (axis,) = globalpru_reporting.over_rates(points).axes
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.get_lines()}
    assert len(looks) == 15


@pytest.mark.parametrize("curve", [None, {}, {"nothing": []}])
def test_no_curve_no_plot(curve):
    read = Reader(page(small_result(), curve=curve))
    assert read.tags.count("svg") == 3
    assert "Accuracy over the pruning rate" not in read.headings


@pytest.mark.parametrize("point", [(1.0, 0.9), (-0.1, 0.9), (0.5, float("nan")), (0.5,), 0.5, ("a", "b"), None])
def test_a_bad_point_is_told(point):
    with pytest.raises(ValueError, match=re.escape(f"curve['x'] holds {point!r}; it must hold (rate in [0, 1)")):
        page(small_result(), curve={"x": [(0.1, 0.9), point]})


# --- what a run can look like


def test_one_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 3))
    read = Reader(page(make_result(model, torch.randn(1, 3, 12, 12), traces=traces)))
    assert "40 images voted in 1 election;" in read.text
    assert "Votes in 1 of 1 election (by layer: 1)." in read.text
    assert "details" not in read.tags
    assert read.tags.count("svg") == 3


def test_many_layers():
    result = make_result(build("resnet56", in_channels=3, num_classes=10), torch.zeros(1, 3, 32, 32), traces=traces)
    text = page(result)
    read = Elements(text)
    assert "40 images voted in 30 elections" in read.text
    assert len(pictures(read)) == 30 + 5  # with the scales of five figures
    assert read.tags.count("svg") == 2 + 5
    assert "Votes in other elections, part 4 of 4 (by layer: " in read.text
    assert len(text) < 1e6


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.01},
        {"rate": 0.99},
        {"noise": 100.0},
        {"kendall": torch.full((2, 2), float("nan"), dtype=torch.float64)},
        {"votes": [torch.zeros(8, 8, dtype=torch.int64), torch.zeros(6, 6, dtype=torch.int64)]},
        {"traces": lambda count: torch.zeros(count, dtype=torch.float64)},
    ],
    ids=["nothing removed", "one a layer", "no agreement", "no number", "no votes", "traces of 0"],
)
def test_odd_runs(changes):
    read = Reader(page(small_result(**changes)))
    assert read.tags.count("svg") == 3
    assert not re.search(r"\b(nan|inf)\b", " ".join(value for key, value in read.attributes if key in ("d", "x", "y")))
    assert not re.search(r"\b(nan|inf)\b", read.text)


def test_accuracies_in_another_unit():
    result = small_result()
    history = tuple(dataclasses.replace(each, accuracy=100 * each.accuracy) for each in result.history)
    read = Reader(page(dataclasses.replace(result, history=history)))
    assert "validation accuracy 92.84 93 +0.16" in read.text
    assert "93 – – 30.0" in read.text


@pytest.mark.parametrize("mode", ["fixed", "mixed"])
def test_a_real_run(tmp_path, mode):
    """Its excitations are no layers of the tables; what is told is what it holds."""
    model, images, labels = trainers.small(), trainers.images(16), torch.randint(5, (16,))

    def train(network, epochs, start_epoch, penalty):
        trainers.nudge(network, epochs, start_epoch)

    def loss(network, batch):
        return torch.nn.functional.cross_entropy(network(batch[0]), batch[1])

    measured = {"loss": loss, "batches": [(images, labels)]} if mode == "mixed" else {}
    gp = GlobalPru(model, images[:2], rate=0.5, mode=mode)
    result = gp.run(train=train, evaluate=lambda network: 0.75, epochs=2, images=images, **measured)
    path = tmp_path / "report.html"
    result.report(path)
    read = Elements(path.read_text(encoding="utf-8"))
    cost, whole = result.channels.cost(result.keep), result.channels.cost()
    assert f"parameters {whole.params:,} {cost.params:,}" in read.text
    assert "16 images voted in 2 elections" in read.text
    assert "excitation." not in read.text
    assert result.message in read.text
    widths = globalpru_reporting.shown(result)
    assert [name for name, *_ in widths] == ["0", "3", "8"]
    kept = [round((1 - rate) * size) for rate, size in zip(result.rates.tolist(), (8, 12), strict=True)]
    assert globalpru_reporting.numbers(result) == [1, 2]
    assert [after for *_, after, _ in widths] == [*kept, 5]
    assert ("Hessian trace" in read.text) == (mode == "mixed")
    assert len(pictures(read)) == 3


@pytest.mark.slow
def test_matplotlib_is_imported_by_the_report_only_and_pyplot_never():
    code = (
        "import sys, paamops, paamops.methods.globalpru_run, paamops.globalpru_reporting\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('matplotlib', 'jinja2')])\n"
        "from tests.test_globalpru_reporting import small_result, page\n"
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
