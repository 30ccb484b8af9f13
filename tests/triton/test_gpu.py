"""The dispatched ops on a GPU, at sizes that fill it, against float64; without host syncs; the same bits every run."""

import itertools

import pytest
import torch

from paamops.ops.activation_attention import activation_attention
from paamops.ops.cumulative_threshold import cumulative_threshold
from paamops.ops.filter_attention import filter_attention, filter_attention_reference
from paamops.ops.filter_distances import filter_distances, filter_distances_reference
from paamops.ops.filter_norms import filter_norms, filter_norms_reference
from paamops.ops.leaky_exponential import leaky_exponential
from paamops.ops.pack_channels import pack_channels
from paamops.ops.project_filters import project_filters
from paamops.ops.registration import build_info
from paamops.ops.relu_attention import relu_attention
from paamops.ops.scale_channels import scale_channels
from paamops.ops.scatter_channels import scatter_channels
from paamops.ops.tempered_sigmoid import tempered_sigmoid
from tests.tolerances import accumulator, assert_close

pytestmark = pytest.mark.gpu

SHAPES = [(64, 256, 56, 56), (32, 512, 7, 7), (1, 3, 1024, 1024), (128, 1000), (4, 24, 5, 31, 33), (3, 1, 999, 1001)]
FORMATS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ALL = ("mean", "max", "sum")


def expected(x, p):
    power = x.double().reshape(*x.shape[:2], -1).abs() ** p
    return power.mean(-1), power.amax(-1), power.sum(-1)


@pytest.fixture
def without_sync():
    """Any wait of the host for the device is an error."""

    def call(function, *args, **kwargs):
        function(*args, **kwargs)  # compiles and fills the caches
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


def test_the_kernels_serve():
    kernels = build_info()["kernels"]
    for op in ("activation_attention", "relu_attention", "cumulative_threshold", "pack_channels"):
        assert kernels[op]["cuda"] == kernels[op + "_backward" * (op != "cumulative_threshold")]["cuda"] == "Triton"
    assert kernels["filter_norms"]["cuda"] == kernels["filter_distances"]["cuda"] == "Triton"
    for op in ("filter_attention", "project_filters", "leaky_exponential", "tempered_sigmoid", "scale_channels"):
        assert kernels[op]["cuda"] == kernels[f"{op}_backward"]["cuda"] == "Triton"
    assert kernels["scatter_channels"]["cuda"] == "Triton"  # its own backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, layout, dtype, without_sync):
    x = FORMATS[layout](torch.randn(shape, device="cuda", dtype=dtype))
    for p in (1, 2, 1.5):
        actual = without_sync(activation_attention, x, p, ALL, per_image=True)
        again = activation_attention(x, p, ALL, per_image=True)
        for mine, same, right in zip(actual, again, expected(x, p), strict=True):
            assert torch.equal(mine, same)
            assert_close(mine, right, accumulator(dtype))
    y, actual = without_sync(relu_attention, x, 1, ALL, per_image=True)
    assert torch.equal(y, torch.relu(x))
    for mine, right in zip(actual, expected(y, 1), strict=True):
        assert_close(mine, right, accumulator(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_gradients(shape, layout, dtype):
    x = FORMATS[layout](torch.randn(shape, device="cuda", dtype=dtype)).detach().requires_grad_()
    weights = torch.randn(3, *shape[:1], x.shape[1], device="cuda", dtype=torch.float64)

    def gradient(values, inputs):
        return torch.autograd.grad(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), inputs)[0]

    actual = gradient(activation_attention(x, 2, ALL, per_image=True), x)
    rows = x.detach().double().reshape(*x.shape[:2], -1)
    slope, area = 2 * rows, rows.shape[-1]
    wanted = (weights[0] / area + weights[2])[..., None] * slope
    # The first maximum: of float16 and bfloat16 there are many equal ones.
    magnitude = rows.abs()
    places = torch.arange(area, device="cuda").expand_as(rows)
    first = torch.where(magnitude == magnitude.amax(-1, keepdim=True), places, area).amin(-1, keepdim=True)
    wanted.scatter_add_(-1, first, weights[1][..., None] * slope.gather(-1, first))
    assert_close(actual, wanted.view(x.shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 1000, 26_560, 1_000_003])
def test_threshold(count, weighted, dtype, without_sync):
    scores = torch.randn(count, device="cuda").to(dtype)
    costs = torch.randint(0, 1000, (count,), device="cuda") if weighted else None
    total = count if costs is None else int(costs.sum())
    for budget in (0, total // 3, total):
        threshold, keep = without_sync(cumulative_threshold, scores, costs, budget)
        order = scores.sort(descending=True, stable=True).indices
        spent = (torch.ones_like(order) if costs is None else costs)[order].cumsum(0)
        wanted = torch.empty_like(keep).scatter_(0, order, spent <= budget)
        assert torch.equal(keep, wanted)
        assert threshold == (scores[order][spent > budget].max() if not keep.all() else -torch.inf)


RESNET_56, VGG_16 = [16] * 19 + [32] * 18 + [64] * 18, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("heights", [RESNET_56, VGG_16, [4000], [0, 300, 1]], ids=len)
def test_filter_attention(heights, spread, without_sync):
    rows = (torch.randn(sum(heights), 64, device="cuda") * spread).requires_grad_()
    v = torch.randn(len(heights), 32, device="cuda", requires_grad=True)
    b = torch.randn(len(heights), device="cuda", requires_grad=True)
    offsets, grad = [0, *itertools.accumulate(heights)], torch.randn(sum(heights), device="cuda")

    def both(rows, v, b, grad):
        x = filter_attention(rows[:, :32], rows[:, 32:], v, b, offsets=offsets)
        return x, *torch.autograd.grad(x, (rows, v, b), grad)

    actual, again = without_sync(both, rows, v, b, grad), both(rows, v, b, grad)
    exact = both(*[t.detach().double().requires_grad_() for t in (rows, v, b)], grad.double())
    direct = filter_attention_reference(*[t.double() for t in (rows[:, :32], rows[:, 32:], v, b)], offsets, ())
    assert_close(exact[0], direct, torch.float64)
    scale = max(heights) ** 0.5 * 8  # of the sums, which cancel: their terms are bounded by v, grad and 1
    for mine, same, right, terms in zip(actual, again, exact, (32, 8, scale, scale), strict=True):
        assert torch.equal(mine, same)
        assert_close(mine / terms, right / terms, torch.float32)


@pytest.mark.parametrize("standardised", [False, True])
def test_project_filters(standardised, without_sync):
    shapes = [(16, 27), *[(64, 576)] * 5, (0, 9), (512, 4608), (1000, 512), (33, 65)]
    rows = [torch.randn(shape, device="cuda") + 1 for shape in shapes]
    weight = torch.randn(sum(d for _, d in shapes), 64, device="cuda", requires_grad=True)
    grad = torch.randn(sum(n for n, _ in shapes), 64, device="cuda")

    def both(rows, weight, grad):
        result = project_filters(rows, weight, standardised)
        return result, *torch.autograd.grad(result, weight, grad)

    actual, again = without_sync(both, rows, weight, grad), both(rows, weight, grad)
    double = [row.double().cpu() for row in rows], weight.detach().double().cpu().requires_grad_(), grad.double().cpu()
    for mine, same, right in zip(actual, again, both(*double), strict=True):
        assert torch.equal(mine, same)
        assert_close(mine / 1000, right / 1000, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 26_560, 1_000_003])
@pytest.mark.parametrize("activation", [leaky_exponential, tempered_sigmoid])
def test_score_activations(activation, count, dtype, without_sync):
    x = (torch.randn(count, device="cuda") * 2).to(dtype).requires_grad_()
    grad = torch.rand(count, device="cuda").to(dtype)

    def both(x, grad):
        score, total = activation(x, 0.5, l1=True)
        return score, total, *torch.autograd.grad((score, total), x, (grad, torch.ones_like(total)))

    actual, again = without_sync(both, x, grad), both(x, grad)
    exact = both(x.detach().double().cpu().requires_grad_(), grad.double().cpu())
    for mine, same, right, kind in zip(actual, again, exact, (dtype, accumulator(dtype), dtype), strict=True):
        assert torch.equal(mine, same)
        assert_close(mine, right, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_channels(shape, layout, dtype, without_sync):
    x = FORMATS[layout](torch.randn(shape, device="cuda").to(dtype)).detach().requires_grad_()
    s = torch.rand(x.shape[1], device="cuda", dtype=accumulator(dtype), requires_grad=True)
    grad = torch.randn(x.shape, device="cuda").to(dtype)

    def both(x, s, grad):
        y = scale_channels(x, s)
        return y, *torch.autograd.grad(y, (x, s), grad)

    actual, again = without_sync(both, x, s, grad), both(x, s, grad)
    wide = s.detach().double().view(-1, *[1] * (x.ndim - 2))
    space = (0, *range(2, x.ndim))
    products = grad.double() * x.detach().double()
    terms = products.abs().sum(space)  # the sums cancel: relative to their terms
    assert all(torch.equal(mine, same) for mine, same in zip(actual, again, strict=True))
    assert_close(actual[0], x.detach().double() * wide, dtype)
    assert_close(actual[1], grad.double() * wide, dtype)
    assert_close(actual[2] / terms, products.sum(space) / terms, accumulator(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["l1", "l2", "distances"])
def test_filters(op, dtype, without_sync):
    shapes = [(64, 3, 7, 7), *[(256, 64, 1, 1), (64, 64, 3, 3)] * 9, (512, 256, 3, 3), (1000, 2048), (64, 32, 4, 4)]
    weights = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    weights[2:9:3] = [weight.contiguous(memory_format=torch.channels_last) for weight in weights[2:9:3]]
    axes, groups = [0] * (len(shapes) - 1) + [1], [1] * (len(shapes) - 1) + [4]

    def both(weights):
        return filter_distances(weights, axes, groups) if op == "distances" else filter_norms(weights, axes, groups, p)

    p = 1 if op == "l1" else 2
    actual, again = without_sync(both, weights), both(weights)
    wide = [weight.double() for weight in weights], axes, groups
    exact = filter_distances_reference(*wide) if op == "distances" else filter_norms_reference(*wide, p)
    assert torch.equal(actual, again)
    assert_close(actual, exact, accumulator(dtype))


def test_pack_a_network():
    sizes = [(64, 3, 7, 7), *[(256, 128, 3, 3), (256,), (512, 256, 1, 1), (512,)] * 12, (1000, 512)]
    formats = [torch.contiguous_format, torch.channels_last]
    for dtype in (torch.float32, torch.float16, torch.int64, torch.bool, torch.complex128):
        tensors = [
            (torch.randn(size, device="cuda") * 9).to(dtype).to(memory_format=formats[t % 2 * (len(size) == 4)])
            for t, size in enumerate(sizes)
        ]
        vectors = {size: torch.arange(0, size, 2, device="cuda") for shape in sizes for size in shape if size > 16}
        indices = [[vectors.get(size) for size in shape] for shape in sizes]
        for tensor, packed in zip(tensors, pack_channels(tensors, indices), strict=True):
            half = tensor[tuple(slice(None, None, 2 if size > 16 else 1) for size in tensor.shape)]
            assert torch.equal(packed, half)
            assert packed.numel() == half.numel()


def test_a_tensor_of_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.ones(1, 3, 2**15, 2**15, device="cuda", dtype=torch.float16)
    x[0, 2, -1, -1] = -5
    mean, peak = activation_attention(x, 1, ("mean", "max"))
    assert peak.tolist() == [1, 1, 5]
    assert_close(mean, torch.tensor([1, 1, 1 + 4 / 2**30]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_channels(shape, layout, dtype, without_sync):
    x = FORMATS[layout](torch.randn(shape, device="cuda").to(dtype)).detach().requires_grad_()
    index = torch.randperm(2 * x.shape[1], device="cuda")[: x.shape[1]]
    y = without_sync(scatter_channels, x, index, 2 * x.shape[1])
    assert torch.equal(y[:, index], x)
    assert (y != 0).sum() == (x != 0).sum()
    grad = torch.randn_like(y)
    (of_x,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(of_x, grad[:, index])
