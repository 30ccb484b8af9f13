"""Attacks on linear models, whose optimum is known; networks that come out as they went in; what is stored."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import attacks, robustness, tables
from bench.ablations import workshop
from paamops import data, models, saving, training
from paamops.data.sets import Dataset, Split

ATTACKS = {"fgsm": attacks.fgsm, "pgd": attacks.pgd}


def away_from_zero(*shape, dtype=torch.float64):
    values = torch.rand(shape, dtype=dtype) + 0.1
    return torch.where(torch.rand(shape) < 0.5, values, -values)


def binary(weight):
    """Logits 0 and w·x: of label 0 the loss grows with w·x, of label 1 it falls."""

    def classify(images):
        score = images.flatten(1) @ weight
        return torch.stack([torch.zeros_like(score), score], 1)

    return classify


def loss(classify, images, labels):
    return F.cross_entropy(classify(images), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_linear_model_is_attacked_best(attack, eps, dtype):
    weight = away_from_zero(48, dtype=dtype) / 4
    images, labels = torch.rand(9, 3, 4, 4, dtype=dtype), torch.randint(2, (9,))
    images[0], images[1] = 0, 1  # the box cuts there
    direction = weight.sign().view(3, 4, 4) * (1 - 2 * labels).view(-1, 1, 1, 1)
    expected = (images + eps * direction).clamp(0, 1)
    found = attack(binary(weight), images, labels, eps)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    others = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    best = loss(binary(weight), found, labels)
    assert (best >= loss(binary(weight), others, labels) - 1e-5).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_pgd_is_no_weaker_than_fgsm_on_a_linear_model(steps):
    weight = away_from_zero(48) / 4
    images, labels = torch.rand(20, 3, 4, 4).double(), torch.randint(2, (20,))
    by_pgd = attacks.pgd(binary(weight), images, labels, 0.1, steps)
    by_fgsm = attacks.fgsm(binary(weight), images, labels, 0.1)
    assert (loss(binary(weight), by_pgd, labels) >= loss(binary(weight), by_fgsm, labels)).all()


def test_fgsm_of_several_classes_by_the_formula():
    weight = torch.randn(5, 12).double()
    images, labels = torch.rand(7, 3, 2, 2).double(), torch.randint(5, (7,))
    shares = (images.flatten(1) @ weight.T).softmax(1)
    expected = ((shares - F.one_hot(labels, 5)) @ weight).view_as(images)
    found = attacks.fgsm(lambda x: x.flatten(1) @ weight.T, images, labels, 0.01)
    assert torch.equal(found, (images + 0.01 * expected.sign()).clamp(0, 1))


def network():
    """A small network in which train mode shows: a norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5)
    )


@pytest.mark.parametrize("eps", [0.02, 0.7])
def test_pgd_stays_in_the_ball_and_in_the_box(eps):
    model, seen = network().eval(), []

    def classify(images):
        seen.append(images.detach())
        return model(images)

    images, labels = torch.rand(6, 3, 4, 4), torch.randint(5, (6,))
    seen.append(attacks.pgd(classify, images, labels, eps, steps=7))
    assert len(seen) == 8
    for each in seen:  # every iterate, not the last only
        assert (each >= (images - eps).clamp(min=0)).all()
        assert (each <= (images + eps).clamp(max=1)).all()


def test_pgd_is_stronger_than_its_start():
    """On a network it raises the loss of most images, which no step in the wrong direction would."""
    torch.manual_seed(3)  # of a network's curvature nothing is known for every seed
    model = network().eval()
    images, labels = torch.rand(64, 3, 4, 4), torch.randint(5, (64,))
    clean, by_fgsm, by_pgd = (
        loss(model, x, labels).detach()
        for x in (images, *(attack(model, images, labels, 0.1) for attack in ATTACKS.values()))
    )
    assert clean.mean() < by_fgsm.mean() < by_pgd.mean()
    assert (by_pgd > clean).all()


def test_seed_of_pgd_decides():
    weight = torch.zeros(48)  # no gradient: what is drawn stays
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1])
    first, again, other = (attacks.pgd(binary(weight), images, labels, 0.1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first - images).abs().max() > 0.09  # 48 draws from the whole ball, from the lowest to the highest
    assert first.min() < 0.5 < first.max()
    state = torch.get_rng_state()
    attacks.pgd(binary(weight), images, labels, 0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_gradients_and_images_stay(attack):
    model = network().eval()
    images, labels = torch.rand(6, 3, 4, 4), torch.randint(5, (6,))
    before = images.clone()
    with torch.no_grad():
        found = attack(model, images, labels, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.requires_grad
    assert not images.requires_grad
    assert torch.equal(images, before)
    assert torch.equal(attack(model, images[2:3], labels[2:3], 0.0), images[2:3])


def dataset(shape=(3, 4, 4), n=50, low=0, high=256, num_classes=5):
    def split(size):
        images = torch.randint(low, high, (size, *shape)).to(torch.uint8)
        return Split(images, torch.randint(num_classes, (size,)))

    mean, std = 100 + 50 * torch.rand(shape[0]), 40 + 50 * torch.rand(shape[0])
    return Dataset("made up", num_classes, split(n), split(n), split(n), mean, std, False)


class Binary(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 1)

    def forward(self, x):
        score = self.linear(x.flatten(1))
        return torch.cat([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize("kind", ATTACKS)
def test_accuracy_of_a_linear_model_by_its_margins(kind):
    """Far from the ends of the box an image stands the attack where its margin is above eps times the l1 norm."""
    made, model, eps = dataset(low=40, high=216, num_classes=2, n=700), Binary(48), 0.004
    with torch.no_grad():
        model.linear.weight.copy_(away_from_zero(1, 48) / 20)
    margins = model.double()(made.normalise(made.test.images).double())[:, 1] * (2 * made.test.labels - 1)
    steps = 255 * eps * model.linear.weight.view(made.shape).abs().sum((1, 2)) / made.std.double()
    model.float()
    attack = {"fgsm": lambda *a, number: attacks.fgsm(*a), "pgd": lambda *a, number: attacks.pgd(*a, seed=number)}[kind]
    found = round(len(made.test) * robustness.attacked(model, made, attack, eps))
    assert (margins > steps.sum() + 1e-4).sum() <= found <= (margins > steps.sum() - 1e-4).sum()
    assert found < (margins > 0).sum()


def state(model):
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def test_measured_leaves_the_model_as_it_was():
    model, made = network().train(), dataset(n=300)  # more than a batch
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(5)
    before = state(model)
    run = robustness.measured(model, made, eps=[0.0, 0.1], steps=2)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert run["clean"] == round(100 * training.accuracy(model, made, made.test), 2)
    assert set(run) == {"params", "flops", "clean", "fgsm", "pgd"}
    assert run == robustness.measured(model, made, eps=[0.0, 0.1], steps=2)
    for name in ("fgsm", "pgd"):  # eps 0 is the clean image but for the rounding of 255 · (x / 255)
        assert run[name][0] == pytest.approx(run["clean"], abs=1)
        assert run[name][1] < run["clean"] or run["clean"] == 0


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("sklearn")
    small = workshop.subset(data.load("digits"), 80, 40)
    monkeypatch.setattr(data, "load", lambda name, root=None: small)
    return small


def saved(folder, names):
    for name in names:
        saving.save(models.build("lenet5", in_channels=1), folder / f"{name}.safetensors")
    return [f"{name[:-1]}={folder / name}.safetensors" for name in names]


def test_stored_networks(digits, tmp_path, capsys):
    files = saved(tmp_path, ["dense0", "small0", "dense1"])
    command = [*files, "--eps", "0.1", "0.2", "--steps", "2", "--results", str(tmp_path / "results")]
    for _ in range(2):  # a second run takes the place of the first
        assert robustness.main(command) == 0
        (path,) = (tmp_path / "results").iterdir()
        assert path.name.startswith("robustness-digits-")
        stored = json.loads(path.read_text())
        assert {seed: list(runs) for seed, runs in stored["seeds"].items()} == {"0": ["dense", "small"], "1": ["dense"]}
    run = stored["seeds"]["1"]["dense"]
    model = saving.load(tmp_path / "dense1.safetensors")
    assert run == robustness.measured(model, digits, [0.1, 0.2], 2)
    assert run["params"] == sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.endswith(robustness.table(stored) + "\n")


def test_file_of_another_network(digits, tmp_path):
    path = tmp_path / "a.safetensors"
    for network in (models.build("lenet5", in_channels=3), models.build("lenet5", in_channels=1, num_classes=7)):
        saving.save(network, path)
        with pytest.raises(ValueError, match=r"a.safetensors: is no network for digits"):
            robustness.main([*saved(tmp_path, ["dense0"]), f"b={path}", "--results", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "bad", [["a.safetensors"], ["a="], ["=a"], ["a=b", "--eps", "1.5"], ["a=b", "--steps", "0"], []]
)
def test_bad_command(bad, capsys):
    with pytest.raises(SystemExit):
        robustness.main(bad)
    assert capsys.readouterr().err


def figures(clean, fgsm, pgd, flops=2_500_000):
    return {"params": 10, "flops": flops, "clean": clean, "fgsm": fgsm, "pgd": pgd}


def made_up(**changes):
    first = {"dense": figures(99, [80, 40.5], [70, 2]), "paam": figures(98, [60, 30], [50, 0], flops=1_000_000)}
    second = {"dense": figures(98, [82, 40.5], [71, 0])}
    machine = {"device": "CPU", "threads": 2, "torch": "2.13", "date": "2026-11-21"}
    settings = {"data": "digits", "images": 1540, "eps": [0.02, 0.1], "steps": 10}
    stored = {"machine": machine, "attacks": settings, "titles": {"dense": "unpruned"}}
    return stored | {"seeds": {"0": first, "3": second}} | changes


def test_table_has_mean_and_deviation():
    lines = robustness.table(made_up()).splitlines()
    assert lines == [
        "| | FLOPs, millions | clean | FGSM, eps 0.02 | FGSM, eps 0.1 | PGD-10, eps 0.02 | PGD-10, eps 0.1 |",
        "|---|---|---|---|---|---|---|",
        "| unpruned | 2.50 ± 0.00 | 98.50 ± 0.71 | 81.00 ± 1.41 | 40.50 ± 0.00 | 70.50 ± 0.71 | 1.00 ± 1.41 |",
        "| paam | 1.00 | 98.00 | 60.00 | 30.00 | 50.00 | 0.00 |",
        "",
        "Accuracy in per cent on 1,540 test images of digits; eps of pixels in [0, 1].",
        "`python -m bench.robustness`, seeds 0, 3: mean ± standard deviation; CPU, 2 CPU threads, torch"
        " 2.13, 2026-11-21.",
    ]
    one = made_up(seeds={"3": made_up()["seeds"]["3"]})
    assert "| unpruned | 2.50 | 98.00 | 82.00 | 40.50 | 71.00 | 0.00 |" in robustness.table(one)
    assert "`, seed 3; CPU" in robustness.table(one)
    assert tables.table(made_up()) == robustness.table(made_up())  # for the README
