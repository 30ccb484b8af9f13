"""ranking_loss: forward and backward against every term of the formula in float64, over chunks, rows and layers."""

import math

import pytest
import torch
from paamops.triton_kernels import ranking_loss as kernels
from paamops.triton_kernels.ranking_loss import ranking_loss, ranking_loss_backward

from tests.ops.test_ranking_loss import DTYPES, check, check_gradient
from tests.tolerances import accumulator
from tests.triton import DEVICE

CHUNKS = [1, 31, 32, 33, 64, 70]  # channels, in chunks of 32


def draw(images, channels, dtype=torch.float32, scale=1.0):
    """A saliency, within what float16 holds at a scale of 1e4, and a ranking of its own."""
    saliency = (torch.randn(images, channels, dtype=torch.float64).clamp(-4, 4) * scale).to(dtype)
    return saliency.to(DEVICE), torch.randperm(channels).to(DEVICE)


def check_layers(layers, tops):
    saliencies, rankings = map(list, zip(*layers, strict=True))
    check(ranking_loss, ranking_loss_backward, saliencies, rankings, tops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHUNKS)
def test_one_layer(channels, dtype):
    for images, top in [(1, 1), (3, channels), (5, (channels + 1) // 2)]:
        check_layers([draw(images, channels, dtype)], [top])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scales(scale, dtype):
    for shift in (0.0, scale):
        saliency, ranking = draw(3, 50, dtype, scale)
        check_layers([(saliency + shift, ranking)], [33])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orders(dtype):
    """Saliencies that rise and fall with the rank, over several chunks; ties, some and all."""
    ramp = torch.arange(70, dtype=torch.float64)
    for step in (0.0, 1e-6, 3.0, 200.0):
        ranked = torch.stack([-step * ramp, step * ramp, (ramp % 7) * step, step * (ramp - 50).abs()])
        ranking = torch.randperm(70)
        saliency = torch.empty(4, 70, dtype=dtype)
        saliency[:, ranking] = ranked.to(dtype)
        check_layers([(row[None].to(DEVICE), ranking.to(DEVICE)) for row in saliency], [66] * 4)


def test_layers_of_all_sizes_in_one_call():
    """Of different images too, some without any; the sums of the programs are added up in several steps."""
    shapes = [(4, 16), (0, 64), (7, 70), (1, 1), (3, 200), (6, 33)]
    check_layers([draw(*shape) for shape in shapes], [5, 64, 69, 1, 12, 32])


def test_many_programs(monkeypatch):
    monkeypatch.setattr(kernels, "SLOTS", 2)
    check_layers([draw(9, 8), draw(8, 40)], [3, 40])


@pytest.mark.parametrize(("rows", "chunk"), [(1, 2), (8, 1), (4, 16)])
def test_cuts(rows, chunk, monkeypatch):
    """Other tiles than those that are launched: what a chunk leaves for the next one is what counts."""
    monkeypatch.setattr(kernels, "ROWS", rows)
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    check_layers([draw(3, 7, scale=0.1), draw(5, 20, scale=30.0)], [7, 13])


def test_the_widest_layer():
    check_layers([draw(1, 4096)], [700])


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second channel": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1)[:, ::2],
    "inside a larger one": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 1), value=math.nan)[1:-1, 2:-3],
    "one image expanded": lambda x: x[:1].expand_as(x),
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for images, channels, top in [(5, 40, 12), (3, 1, 1), (1, 6, 6)]:
        saliency, ranking = draw(images, channels)
        check_layers([(LAYOUTS[layout](saliency), torch.stack([ranking, ranking], 1)[:, 0])], [top])


def test_without_images():
    empty, ranking = draw(0, 5)
    assert ranking_loss([empty], [ranking], [2]) == 0
    (grad,) = ranking_loss_backward(torch.ones((), device=DEVICE), [empty], [ranking], [2])
    assert grad.shape == (0, 5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of infinity less infinity
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_special_values(dtype):
    """NaN stays within its image; -inf below the top is a channel that is not there."""
    one = torch.ones((), dtype=accumulator(dtype), device=DEVICE)
    for rank in (0, 5, 39):
        saliency, ranking = draw(2, 40, dtype)
        saliency[1, ranking[rank]] = math.nan
        assert ranking_loss([saliency], [ranking], [5]).isnan()
        (gradient,) = ranking_loss_backward(one, [saliency], [ranking], [5])
        assert gradient[1].isnan().all()
        check_gradient(gradient[:1] * 2, saliency[:1], ranking, 5)
    saliency, ranking = draw(2, 40, dtype)
    saliency[:, ranking[[6, 20, *range(30, 40)]]] = -math.inf
    check_layers([(saliency, ranking)], [5])
    saliency[1, ranking[2]] = -math.inf
    assert ranking_loss([saliency], [ranking], [5]) == math.inf
    saliency[1, ranking[2]] = math.inf
    assert not ranking_loss([saliency], [ranking], [5]).isfinite()


def test_a_bad_ranking_reads_and_writes_nothing_outside():
    """Guards around the saliency and the gradient stay, and are not read, as they are NaN."""
    for bad in ([0, 1, 2**40, 3], [0, -1, 2, 3], [-(2**62), 4, 4, 4], [1, 1, 1, 1]):
        saliency = torch.full((5, 4), math.nan, device=DEVICE)
        saliency[1:4] = torch.randn(3, 4)
        ranking = torch.tensor(bad, device=DEVICE)
        assert ranking_loss([saliency[1:4]], [ranking], [4]).isfinite()
        (gradient,) = ranking_loss_backward(torch.ones((), device=DEVICE), [saliency[1:4]], [ranking], [4])
        assert gradient.shape == (3, 4)
        written = sorted({min(max(channel, 0), 3) for channel in bad})
        assert gradient[:, written].isfinite().all()
