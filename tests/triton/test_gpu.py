"""The dispatched ops on a GPU, at sizes that fill it, against float64; without host syncs; the same bits every run."""

import pytest
import torch

from paamops.ops.activation_attention import activation_attention
from paamops.ops.cumulative_threshold import cumulative_threshold
from paamops.ops.pack_channels import pack_channels
from paamops.ops.registration import build_info
from paamops.ops.relu_attention import relu_attention
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
