"""The mean trace of the Hessian: exact where it is diagonal, else within the known variance; the model stays as it is.

Bounds of what is random are 10 standard deviations of a mean of many samples: no seed fails by chance.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paamops import models
from paamops.methods.hessian import hessian_trace, left_alone

SIZES = {"a": 5, "b": 12, "c": 3}  # of the quadratic's parameters, b of shape (4, 3)


class Quadratic(nn.Module):
    """½ wᵀ A w, w all parameters together; A is the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.randn(4, 3).double())
        self.c = nn.Parameter(torch.randn(3).double())

    def forward(self, matrix):
        w = torch.cat([self.a, self.b.flatten(), self.c])
        return w @ matrix @ w / 2


def apply(model, batch):
    return model(batch)


def symmetric():
    matrix = torch.randn(20, 20, dtype=torch.float64)
    return matrix + matrix.T


def blocks(sizes=SIZES):
    """name -> the rows of its elements."""
    stops = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}


def known(hessian, sizes):
    """(mean trace, standard deviation of a sample of it) for each block, (L,) each."""
    means, deviations = [], []
    for rows in blocks(sizes).values():
        own, count = hessian[rows, rows], rows.stop - rows.start
        variance = 2 * (own.square().sum() - own.diagonal().square().sum())
        means.append(own.trace() / count)
        deviations.append(variance.sqrt() / count)
    return torch.stack(means), torch.stack(deviations)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a"], ["b"]], ids=str)
def test_diagonal_hessian_is_exact_with_one_sample(names):
    diagonals = torch.randn(3, 20, dtype=torch.float64)
    found = hessian_trace(Quadratic(), apply, [d.diag() for d in diagonals], names, samples=1, seed=7)
    expected = torch.stack([diagonals.mean(0)[blocks()[name]].mean() for name in names])
    torch.testing.assert_close(found.trace, expected, rtol=1e-12, atol=1e-13)
    assert found.trace.dtype == found.error.dtype == torch.float64
    assert found.error.isnan().all()  # one sample tells nothing of its error


def test_dense_hessian_within_its_known_variance(seed):
    matrix, samples = symmetric(), 500
    found = hessian_trace(Quadratic(), apply, [matrix], SIZES, samples=samples, seed=seed)
    mean, deviation = known(matrix, SIZES)
    error = deviation / samples**0.5
    assert ((found.trace - mean).abs() < 10 * error).all()
    assert ((found.error > error / 2) & (found.error < 2 * error)).all()


def test_every_batch_has_its_own_signs(seed):
    matrix, samples = symmetric(), 500
    found = hessian_trace(Quadratic(), apply, [matrix] * 4, SIZES, samples=samples, seed=seed)
    mean, deviation = known(matrix, SIZES)
    error = deviation / 4**0.5 / samples**0.5  # with the same signs for all batches as large as for one
    assert ((found.trace - mean).abs() < 10 * error).all()
    assert ((found.error > 0.6 * error) & (found.error < 1.6 * error)).all()


def network():
    """Smooth, with a norm in it and no more parameters than a whole Hessian allows."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.double()


def cross_entropy(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def labelled(n=6, shape=(2, 3, 3), classes=2):
    return torch.randn(n, *shape, dtype=torch.float64), torch.randint(classes, (n,))


@pytest.mark.parametrize("relu", [False, True])
def test_network_against_its_whole_hessian(seed, relu):
    model, batches = network(), [labelled() for _ in range(3)]
    if relu:
        model[2] = nn.ReLU()
    model.eval()
    names, samples = ["0.weight", "1.weight", "4.weight", "6.bias"], 300
    tensors = dict(model.named_parameters())
    sizes = {name: tensors[name].numel() for name in names}

    def loss(flat, images, labels):
        parts = flat.split(list(sizes.values()))
        own = {name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, own, (images,)), labels)

    flat = torch.cat([tensors[name].detach().flatten() for name in names])
    each = [known(torch.func.hessian(loss)(flat, *batch), sizes) for batch in batches]
    mean = torch.stack([mean for mean, _ in each]).mean(0)
    error = torch.stack([deviation**2 for _, deviation in each]).sum(0).sqrt() / len(batches) / samples**0.5
    found = hessian_trace(model.train(), cross_entropy, batches, names, samples=samples, seed=seed)
    rounding = 1e-12 * mean.abs().max()
    assert ((found.trace - mean).abs() <= 10 * error + rounding).all()
    assert ((found.error >= error / 3 - rounding) & (found.error <= 3 * error + rounding)).all()
    assert mean.abs().max() > 0


def test_seed_decides():
    model, batch = network(), labelled()
    first, again, other = (
        hessian_trace(model, cross_entropy, [batch], ["0.weight"], samples=3, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.trace, again.trace)
    assert torch.equal(first.error, again.error)
    assert not torch.equal(first.trace, other.trace)


def test_generators_are_gone_through_once_and_callers_draws_stay():
    state = torch.get_rng_state()
    model, matrices = Quadratic(), [symmetric() for _ in range(3)]
    torch.set_rng_state(state)
    found = hessian_trace(model, apply, iter(matrices), ["a"], samples=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.trace, hessian_trace(model, apply, matrices, ["a"], samples=2).trace)


def test_parameters_that_the_loss_takes_linearly_have_none():
    def loss(model, batch):
        return model.a.square().sum() + (model.b * batch).sum()

    found = hessian_trace(Quadratic(), loss, [torch.randn(4, 3).double()], ["a", "b"], samples=2)
    assert found.trace.tolist() == [2, 0]
    linear = hessian_trace(Quadratic(), lambda model, batch: model.a.sum(), [0], ["a"], samples=2)
    assert linear.trace.tolist() == [0]


def test_bilinear_loss():
    """∂²/∂a² is 0 though the gradient of each of the two depends on the other."""

    def loss(model, batch):
        return model.a[:3] @ model.c

    found = hessian_trace(Quadratic(), loss, [0], ["a", "c"], samples=3)
    assert found.trace.tolist() == [0, 0]  # exactly: what other layers add is not in it
    assert found.error.tolist() == [0, 0]


class Restless(nn.Module):
    """Counts its calls in eval mode too, in a buffer in place and in one that it replaces."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.tensor([float("nan")]))
        self.register_buffer("nothing", None)

    def forward(self, x):
        assert not self.training
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.inner(x)


def state(model):
    """All that must not change, values copied and objects by their identity."""
    return {
        "values": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def restless():
    model = Restless()
    model.train()
    model.inner[1].eval()  # modes that differ
    model.inner[0].weight.requires_grad_(False)
    for parameter in list(model.parameters())[1::2]:
        parameter.grad = torch.randn_like(parameter)
    return model


def test_model_is_left_as_it_was():
    model, batch = restless(), labelled()
    before = state(model)
    with torch.no_grad():  # whatever the caller has set
        found = hessian_trace(model, cross_entropy, [batch, batch], ["inner.0.weight", "inner.4.weight"], samples=2)
    assert_same(before, state(model))
    assert found.trace.abs().min() > 0  # also of the frozen one


def test_model_is_left_as_it_was_after_an_error():
    model, batch = restless(), labelled()
    before = state(model)

    def failing(model, batch):
        cross_entropy(model, batch)
        raise KeyError("mine")

    for loss in (failing, lambda model, batch: cross_entropy(model, batch) * float("nan")):
        with pytest.raises((KeyError, ValueError)):
            hessian_trace(model, loss, [batch], ["inner.0.weight"])
        assert_same(before, state(model))


def test_left_alone_is_in_eval_mode():
    model = restless()
    with left_alone(model):
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    """In another dtype the same up to its rounding, since the signs are the same."""
    torch.manual_seed(0)  # what rounding does must not be chance
    model, (images, labels) = network(), labelled()
    expected = hessian_trace(model, cross_entropy, [(images, labels)], ["0.weight", "6.weight"], samples=4)
    found = hessian_trace(
        copy.deepcopy(model).to(dtype), cross_entropy, [(images.to(dtype), labels)], ["0.weight", "6.weight"], samples=4
    )
    assert found.trace.dtype == torch.float64
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(
        found.trace, expected.trace, rtol=tolerance, atol=tolerance * expected.trace.max().item()
    )


def test_network_of_the_package():
    model = models.build("resnet20", in_channels=1).double()
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 4]
    batches = [labelled(4, (1, 12, 12), 10) for _ in range(2)]
    before = state(model)
    found = hessian_trace(model, cross_entropy, batches, names, samples=2)
    assert_same(before, state(model))
    assert found.trace.shape == (len(names),)
    assert (found.trace.abs() > 0).all()


def test_tied_parameters_have_one_trace():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    by_one, by_other = (
        hessian_trace(model, lambda m, x: m(x).square().sum(), [torch.eye(3).double()], [name], samples=3)
        for name in ("0.weight", "1.weight")
    )
    assert torch.equal(by_one.trace, by_other.trace)
    with pytest.raises(ValueError, match=r"parameters names '0.weight' and '1.weight', which are one tensor"):
        hessian_trace(model, apply, [0], ["0.weight", "1.weight"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"parameters": []}, ValueError, "parameters is empty"),
        ({"parameters": "a"}, TypeError, "parameters is the string 'a'"),
        ({"parameters": ["a", "d"]}, ValueError, "parameters names 'd', which is no parameter of the model"),
        ({"parameters": ["a", "a"]}, ValueError, "must name each one once"),
        ({"parameters": ["whole"]}, ValueError, "'whole', which is torch.int64"),
        ({"parameters": ["empty"]}, ValueError, "'empty', which has no elements"),
        ({"parameters": ["buffer"]}, ValueError, "'buffer', which is no parameter of the model .it is a buffer"),
        ({"samples": 0}, ValueError, "samples is 0; it must be at least 1"),
        ({"samples": 2.0}, TypeError, "samples is a float"),
        ({"seed": None}, TypeError, "seed is a NoneType"),
        ({"loss": lambda model, batch: 1.0}, TypeError, "loss returned a float for batch 1"),
        ({"loss": lambda model, batch: model.a}, ValueError, r"loss returned a tensor of shape \(5,\) for batch 1"),
        (
            {"loss": lambda model, batch: (model.a.sum() + model.b.sum()) * batch},
            ValueError,
            "loss is inf for batch 2; it must be finite",
        ),
        ({"loss": lambda model, batch: torch.ones(())}, ValueError, "loss does not depend on 'a', 'b' for batch 1"),
        ({"loss": lambda model, batch: model.a.sum()}, ValueError, "loss does not depend on 'b' for batch 1"),
        ({"loss": lambda model, batch: (model.a * 0 + model.b.sum() * 0).sum().sqrt()}, ValueError, "'a' is nan"),
    ],
)
def test_bad_input(change, error, message):
    model = Quadratic()
    model.whole = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    model.empty = nn.Parameter(torch.zeros(0))
    model.register_buffer("buffer", torch.zeros(2))
    with torch.no_grad():
        model.a.copy_(torch.arange(1, 6))
    call = {"loss": apply, "batches": [1.0, float("inf")], "parameters": ["a", "b"], "samples": 2, "seed": 0} | change
    with pytest.raises(error, match=message):
        hessian_trace(model, **call)
