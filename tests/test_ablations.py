"""The ablations' scores, thresholds and statistics by hand; each ablation once on digits, at a tiny size."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import paamops
from bench import harness
from bench.ablations import __main__ as command
from bench.ablations import globalpru, paam, pruning, scores, spread, stability, tables, thresholds, workshop
from tests.networks import Plain
from tests.tolerances import assert_close

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")


@pytest.fixture
def plain():
    """A small network with fresh weights, its ChannelMap and images."""
    model = Plain().eval()
    return model, paamops.trace(model, torch.randn(Plain.inputs)), torch.randn(7, *Plain.inputs[1:])


def layers(model):
    return [module for module in model if isinstance(module, nn.Conv2d | nn.Linear)]


def test_l1_mean_by_hand(plain):
    model, channels, _ = plain
    rows = [row for layer in layers(model) for row in layer.weight]
    expected = [sum(abs(w) for w in row.flatten().tolist()) / row.numel() for row in rows]
    assert_close(scores.l1_mean(model, channels), torch.tensor(expected, dtype=torch.float64), torch.float32)


def test_l1_mean_of_a_transposed_convolution_is_that_of_its_filters():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU())
    channels = paamops.trace(model.append(nn.Conv2d(6, 1, 1)), torch.randn(1, 1, 4, 4))
    expected = model[2].weight.detach().double().abs().unflatten(0, (2, 2)).mean((1, 3, 4)).flatten()
    assert_close(scores.l1_mean(model, channels)[4:10], expected, torch.float32)


def test_l1_in_shares_takes_equal_shares(plain):
    model, channels, _ = plain
    with torch.no_grad():
        model[0].weight.mul_(1000)  # the size of a layer's weights does not count
    found = scores.in_shares(channels, paamops.weight_scores(model, channels, "l1"))
    for layer, part in zip(layers(model), found.split([len(layer.weight) for layer in layers(model)]), strict=True):
        order = layer.weight.detach().flatten(1).abs().sum(1).argsort()
        assert_close(part[order], torch.arange(1, len(part) + 1) / len(part), torch.float32)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_image_first_is_what_score_computes(plain, p):
    model, channels, images = plain
    assert_close(
        scores.image_first(model, channels, images, p), paamops.score(model, channels, images, p=p), torch.float32
    )


@pytest.mark.parametrize("p", [1, 2, 4])
def test_batch_first_by_hand(plain, p):
    model, channels, images = plain
    with torch.no_grad():
        a = model[1](model[0](images)).double().mean(0)
    expected = torch.stack([sum(abs(v) ** p for v in part.flatten()) / part.numel() for part in a])
    found = scores.batch_first(model, channels, images, p)
    assert_close(found[:8], expected, torch.float32)
    same = torch.allclose(found[:8], scores.image_first(model, channels, images, p)[:8], rtol=1e-4)
    assert same == (p == 1)


@pytest.mark.parametrize("network", ["plain", "lenet5"])
def test_layer_aware_thresholds_reach_the_size_within_one_set(plain, network):
    if network == "plain":
        model, channels, images = plain
    else:
        model, images = paamops.models.build("lenet5", in_channels=1).eval(), torch.randn(4, 1, 28, 28)
        channels = paamops.trace(model, images)
    found = paamops.score(model, channels, images) + torch.rand(len(channels.filters))
    weights = thresholds.layer_weights(channels)
    sizes = torch.tensor(
        [layer.weight.numel() for layer in model.children() if hasattr(layer, "weight") and layer.weight.dim() > 1]
    )
    assert_close(weights, sizes / sizes.sum(), torch.float32)
    reached = 0
    for removed in (0.01, 0.1, 0.3, 0.5):
        budget = pruning.budget(channels, removed)
        try:
            selection = thresholds.layer_aware(channels, found, budget)
        except ValueError as error:
            assert f"params is {budget:,}" in str(error)  # noqa: PT017
            continue
        reached += 1
        assert selection.achieved.params <= budget
        # The set whose score is nearest below its threshold comes back: then the network is over the budget.
        limits = torch.tensor(selection.threshold, dtype=torch.float64)[channels.filters]
        ratio = channels.set_scores(found) / channels.set_scores(limits)
        ratio[selection.keep] = -math.inf
        keep = selection.keep.clone()
        keep[ratio.argmax()] = True
        assert channels.cost(keep).params > budget
        part = torch.tensor(selection.threshold, dtype=torch.float64)
        assert_close(part / part.sum(), weights, torch.float64)
    assert reached


def test_layer_aware_refuses_what_it_cannot_reach(plain):
    model, channels, images = plain
    found = paamops.score(model, channels, images)
    with pytest.raises(ValueError, match=r"params is 10, but the smallest network that thresholds reach has"):
        thresholds.layer_aware(channels, found, 10)


def test_spread_by_hand():
    assert spread.deviation([1.0]) is None
    assert spread.interval([1.0]) is None
    assert not spread.told_apart([1.0])
    assert spread.deviation([1.0, 2.0, 3.0]) == pytest.approx(1)
    assert spread.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert not spread.told_apart([1.0, 2.0, 3.0])
    assert spread.told_apart([-2.0, -2.1, -1.9])
    assert not spread.told_apart([0.0, 0.0])


def test_overlap_and_correlation_by_hand():
    a = torch.arange(10.0)
    assert stability.overlap(a, a) == 1
    assert stability.overlap(a, -a) == 0
    assert stability.overlap(a, torch.tensor([0.0, 9, 1, 2, 8, 8, 8, 8, 8, 8])) == pytest.approx(2 / 3)
    assert stability.correlation(a, a.exp()) == pytest.approx(1)
    assert stability.correlation(a, -a) == pytest.approx(-1)
    assert stability.correlation(a, torch.zeros(10)) is None


def test_narrow_divides_every_width():
    model = workshop.build("vgg16/8", torch.randn(1, 3, 32, 32), 10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [8] * 2 + [16] * 2 + [32] * 3 + [64] * 6
    for layer in convolutions:
        expected = (2 / layer.weight[0].numel()) ** 0.5
        assert layer.weight.detach().std().item() == pytest.approx(expected, rel=0.3)
    assert (model.linear.in_features, model.linear.out_features) == (64, 10)


def test_distance_by_hand():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[1.0, 2.0]]))
        b.weight.copy_(torch.tensor([[4.0, 2.0]]))
        a.bias.fill_(4)
        b.bias.fill_(0)
    assert pruning.distance(a, b) == pytest.approx(5)


TINY = workshop.Scale(
    network="lenet5",
    train=60,
    test=40,
    epochs=4,
    batch_size=20,
    scored=32,
    learn=2,
    seeds=2,
    removed=(0.5,),
    rounds=(0.3, 0.6),
    rewinds=(0.25, 0.75),
)


@pytest.fixture(scope="module")
def shop():
    return workshop.Workshop("digits", scale=TINY)


def test_subset_keeps_the_classes(shop):
    assert len(shop.dataset.train) == pytest.approx(60, abs=5)
    assert shop.dataset.train.labels.bincount().max() - shop.dataset.train.labels.bincount().min() <= 1
    again = workshop.Workshop("digits", scale=TINY)
    assert torch.equal(again.dataset.train.images, shop.dataset.train.images)


def test_state_of_an_epoch_is_that_of_a_training_that_ends_there(shop):
    """The learning rate does not fall here, so that the first epoch of four is a training of one."""
    states = shop.dense(0).states
    assert list(states) == [1, 3]
    torch.manual_seed(0)
    model = workshop.build("lenet5", shop.example, 10).to(memory_format=torch.channels_last)
    short = workshop.Workshop("digits", scale=replace(TINY, epochs=1))
    short.train(model, 0, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[1][name])
    assert not torch.equal(states[1]["conv1.weight"], states[3]["conv1.weight"])


def test_dense_networks_are_trained_once(shop):
    assert shop.dense(0) is shop.dense(0)
    assert not torch.equal(shop.dense(0).model.conv1.weight, shop.dense(1).model.conv1.weight)


VARIANTS = {
    "mapping": list(pruning.MAPPINGS),
    "order": [f"{first} first, p = {p}" for p in (2, 4) for first in ("image", "batch")],
    "criterion": list(pruning.CRITERIA),
    "layer-aware": ["one threshold", "layer-aware"],
    "rewinding": [f"epoch {epoch}, weights {weights}" for epoch in (1, 3) for weights in ("kept", "rewound")],
    "stability": [f"{a} and {b}" for a, b in stability.KINDS] + ["orders of p = 2", "orders of p = 4"],
    "paam-criterion": ["learned", "l1", "l1 / size", "activation attention", "random"],
    "paam-lambda": ["automatic", "0.3", "1", "3", "6", "12"],
    "paam-attention": list(paam.SCORINGS),
    "paam-gate": ["free", "explicit"],
    "paam-frozen": [*paam.FROZEN, "filters train, and are kept"],
    "globalpru-beta": [globalpru.WITHOUT, *(f"β = {beta:g}" for beta in globalpru.BETAS), globalpru.LATE],
    "globalpru-election": ["assignment", "Borda count", "mean saliency", "random", "assignment, logits"],
    "globalpru-rates": ["GlobalPru", "magnitude"],
}


@pytest.fixture(scope="module")
def measured(shop):
    """A function: the results of an ablation of the shop, measured once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = command.measure(name, shop)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "BATCHES", 3)
        yield of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "criterion" else ()) for name in command.NAMES]
)
def test_ablation_on_digits(shop, measured, name):
    stored = measured(name)
    assert json.loads(command.dump(stored)) == stored
    runs = stored["runs"]
    assert tables.unique(runs, "seed") == [0, 1]
    assert tables.unique(runs, "variant") == VARIANTS[name]
    assert stored["settings"]["train"] == len(shop.dataset.train)
    assert stored["machine"]["torch"] == torch.__version__
    for run in runs if name != "stability" else ():
        if name.startswith("globalpru"):  # asked for is a share of each layer's channels
            assert 0 < run["params_removed"] < 1
        else:
            assert run["params_removed"] >= run["removed"] - 1e-5
            # Filters that never respond go at any threshold, however many they are.
            assert run["params_removed"] < run["removed"] + 0.05 or "layer-aware" in run["variant"]
        assert 0 <= run["before"] <= 1
        assert 0 <= run["after"] <= 1
        assert run["dense"] == pytest.approx(shop.dense(run["seed"]).accuracy, abs=1e-5)
    lines = tables.table(stored).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert all(variant in "\n".join(rows) or name == "rewinding" for variant in VARIANTS[name])
    assert len(rows) >= 2 + (4 if name == "stability" else len(VARIANTS[name]))
    assert "lenet5" in lines[-1]


def test_a_round_goes_on_from_the_one_before(shop, monkeypatch):
    traced, trace = [], shop.trace

    def spy(model):
        traced.append(sum(parameter.numel() for parameter in model.parameters()))
        return trace(model)

    shop.dense(0)  # its trace is not a round's
    monkeypatch.setattr(shop, "trace", spy)
    runs = list(itertools.islice(pruning.criterion(shop), 2))
    assert [run["round"] for run in runs] == [1, 2]
    assert traced[1] == pytest.approx(traced[0] * (1 - runs[0]["params_removed"]))


def test_distance_shrinks_with_the_epoch(measured):
    runs = {run["variant"]: run for run in measured("rewinding")["runs"] if run["seed"] == 0}
    assert runs["epoch 3, weights kept"]["distance"] < runs["epoch 1, weights kept"]["distance"]
    assert runs["epoch 1, weights rewound"]["before"] != runs["epoch 1, weights kept"]["before"]


@pytest.fixture
def normed():
    """A network with batch norms for the digits, as a Dense."""
    blocks = [
        layer
        for a, b in ((1, 6), (6, 8))
        for layer in (nn.Conv2d(a, b, 3, stride=2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    return workshop.Dense(7, model, paamops.trace(model, torch.randn(2, 1, 32, 32)), 0.5, {})


@pytest.mark.parametrize(("filters", "norms"), paam.FROZEN.values())
def test_learning_changes_what_it_says(shop, normed, filters, norms):
    before = {name: tensor.clone() for name, tensor in normed.model.state_dict().items()}
    network = paam.embedded(shop, normed, 0.5)
    assert sum(1 for _ in paam.steps(shop, 7, network, filters, norms)) == network.steps == 2 * shop.steps()
    assert not torch.equal(network.learned(), torch.ones_like(network.learned()))
    changed = {name for name, tensor in network.model.state_dict().items() if not torch.equal(tensor, before[name])}
    buffers = {name for name, _ in normed.model.named_buffers()}
    parameters = {name for name, _ in normed.model.named_parameters()}
    assert all((parameter.grad is None) != filters for parameter in network.model.parameters())
    assert changed == (parameters if filters else set()) | (buffers if norms else set())
    assert not network.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in normed.model.state_dict().items())


def test_equal_settings_learn_once(shop, normed):
    shop = workshop.Workshop("digits", scale=TINY)
    first = paam.learned(shop, normed, 0.5, slope=0.1)
    assert paam.learned(shop, normed, 0.5, slope=0.1) is first
    assert not any(paam.learned(shop, normed, 0.5, **other) is first for other in ({}, {"slope": 0.5}))
    again = paam.learned(workshop.Workshop("digits", scale=TINY), normed, 0.5, slope=0.1)
    assert again[1] == first[1]
    assert torch.equal(again[0].keep, first[0].keep)


def test_a_sweep_holds_lambda_fixed(measured):
    runs = measured("paam-lambda")["runs"]
    fixed = [run for run in runs if run["variant"] != "automatic"]
    assert all(run["lambda"] == float(run["variant"]) for run in fixed)
    found = [run["lambda"] for run in runs if run["variant"] == "automatic"]
    assert all(value != 1 and 0.7 < value < 1.4 for value in found)  # six steps: it has moved once
    for seed in (0, 1):
        limits = [run["threshold"] for run in fixed if run["seed"] == seed]
        assert limits[0] > limits[-1]


def test_both_gates_learn_the_same(measured):
    free, explicit = (
        [run for run in measured("paam-gate")["runs"] if run["variant"] == variant] for variant in ("free", "explicit")
    )
    assert all(run["gradient"] == run["difference"] == 0 for run in free)
    assert all(0 < run["gradient"] < 1e-4 for run in explicit)  # other sums, and so other rounding
    assert all(run["difference"] < 1e-3 for run in explicit)
    assert all(run["milliseconds"] > 0 for run in free + explicit)


def test_thinnest_layer_by_hand(plain):
    model, channels, _ = plain
    found = torch.cat([torch.linspace(0.5, 1, len(layer.weight)) for layer in layers(model)])
    found[1:8] = 0.1  # of the first layer one of eight stays
    selection = paamops.select(channels, found, threshold=0.2)
    dense = workshop.Dense(0, model, channels, 0.5, {})
    assert paam.extras(dense, selection, {"scored": 1.0}) == {"scored": 1.0, "thinnest": 1 / 8}


def test_small_figures_keep_their_digits():
    assert command._rounded([1.23456789e-7, 0.123456789, (1, 0.0)]) == [1.23e-7, 0.12346, [1, 0.0]]


def test_columns_of_what_was_learned():
    base = {"seed": 0, "removed": 0.7, "params_removed": 0.7, "flops_removed": 0.3, "dense": 0.9, "before": 0.5}
    runs = [
        base | {"variant": "learned", "after": 0.8, "lambda": 2.0, "scored": 0.85, "thinnest": 0.25},
        base | {"variant": "l1", "before": 0.4, "after": 0.6, "thinnest": 0.125},
    ]
    head, _, *rows = tables.comparison({"ablation": "paam-criterion", "runs": runs})
    assert "| thinnest layer keeps | λ at the end | accuracy with scores | accuracy before" in head
    assert "| learned | 30.00 % | 25.00 % | 2 | 85.00 % | 50.00 % |  | 80.00 % |  |  |" in rows[0]
    assert "| l1 | 30.00 % | 12.50 % |  |  | 40.00 % | -10.00 | 60.00 % | -20.00 | one seed |" in rows[1]
    assert tables.spanned([1.0, 3.0]) == "2 (1 to 3)"
    assert tables.whole([101.0, 153.4]) == "127 (101 to 153)"


def test_what_diverged_is_told():
    base = {"removed": 0.7, "params_removed": 0.7, "flops_removed": 0.3, "before": 0.5, "after": 0.8}
    runs = [base | {"seed": seed, "variant": tables.BASE["paam-attention"]} for seed in (0, 1)]
    gone = {"removed": 0.7, "diverged": True}
    runs += [base | {"seed": 0, "variant": "some"}, gone | {"seed": 1, "variant": "some"}]
    runs += [gone | {"seed": seed, "variant": "all"} for seed in (0, 1)]
    head, _, _, some, every = tables.comparison({"ablation": "paam-attention", "runs": runs})
    assert "| some (diverged under 1 of 2 seeds) | 30.00 % | 50.00 % | +0.00 | 80.00 % | +0.00 | one seed |" in some
    assert "|  | all (diverged under 2 of 2 seeds) |" in every
    assert every.count("|") == head.count("|")


def test_a_scoring_that_diverges(shop, monkeypatch):
    def learned(shop, dense, removed, **settings):
        raise ValueError("the attention network has diverged" if settings else "else")

    monkeypatch.setattr(paam, "learned", learned)
    with pytest.raises(ValueError, match="else"):
        next(paam.scoring(shop))
    monkeypatch.setattr(paam, "SCORINGS", {"fast": {"slope": 9.0}})
    run = next(paam.scoring(shop))
    assert run == {"seed": 0, "variant": "fast", "removed": shop.scale.removed[-1], "diverged": True}


def test_command_takes_the_scale_of_the_ablation(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command, "measure", lambda name, shop: seen.append((name, shop)) or {"ablation": name})
    monkeypatch.setattr(command, "table", lambda stored: "")
    monkeypatch.setattr(command, "save", lambda path, stored: None)
    command.main(["paam-gate", "mapping", "paam-frozen", "--data", "digits", "--out", str(tmp_path)])
    (_, gate), (_, mapping), (_, frozen) = seen
    assert [name for name, _ in seen] == ["paam-gate", "mapping", "paam-frozen"]
    assert gate is frozen
    assert gate.scale == paam.SCALES["digits"]
    assert mapping.scale == workshop.SCALES["digits"]


def test_noise_is_no_image(shop):
    found = stability.inputs(shop, 0)
    assert {kind: len(batches) for kind, batches in found.items()} == dict.fromkeys(
        ("images", "normal", "uniform"), stability.BATCHES
    )
    assert (
        len({batch.double().sum().item() for batches in found.values() for batch in batches}) == 3 * stability.BATCHES
    )
    for batch in found["uniform"]:
        pixels = batch * shop.dataset.std[:, None, None] + shop.dataset.mean[:, None, None]
        assert pixels.std().item() == pytest.approx(256 / 12**0.5, rel=0.05)


def test_command_writes_the_file_and_prints_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(workshop.SCALES, "digits", TINY)
    monkeypatch.setattr(stability, "BATCHES", 2)
    assert command.main(["stability", "--data", "digits", "--seeds", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "ablation-stability-digits.json"
    stored = json.loads(path.read_text())
    assert stored["settings"]["seeds"] == 1
    assert tables.table(stored) in capsys.readouterr().out
    text = "a\n<!-- ablation: stability-digits -->\nold\n<!-- end of ablation -->\nb\n"
    assert tables.fill(text, tmp_path) == text.replace("old\n", tables.table(stored))


def test_differences_are_paired_by_seed():
    runs = [
        {"seed": seed, "variant": variant, "removed": 0.5773, "params_removed": 0.58, "flops_removed": 0.3}
        | {"filters": 5, "dense": 0.9, "before": 0.5, "after": after}
        for variant, afters in {"mean, p = 1": (0.8, 0.6), "max, p = 1": (0.81, 0.62), "sum, p = 1": (0.9, 0.5)}.items()
        for seed, after in enumerate(afters)
    ]
    lines = tables.comparison({"ablation": "mapping", "runs": runs})
    assert lines[2].endswith("| 58.00 % | mean, p = 1 | 30.00 % | 50.00 % | 70.00 % ± 14.14 |  |  |  |")
    assert lines[3].endswith("| 71.50 % ± 13.44 | +1.50 ± 6.35 | no | -0.13 |")
    assert lines[4].endswith("| +0.00 ± 127.06 | no | -0.25 |")


def test_readme_tables_are_those_of_the_results():
    readme = (tables.HERE / "README.md").read_text()
    assert tables.fill(readme, tables.HERE.parent / "results") == readme, "run `python -m bench.ablations.tables`"


def test_results_have_a_table_each():
    stored = {path.stem.removeprefix("ablation-") for path in (tables.HERE.parent / "results").glob("ablation-*.json")}
    shown = {match[2] for match in tables.MARKED.finditer((tables.HERE / "README.md").read_text())}
    assert stored == shown


def test_the_benchmarks_do_not_see_the_ablations():
    assert not any("ablation" in case.name for case in harness.all_cases())
