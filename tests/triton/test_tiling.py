"""Launch sizes, which are pure functions: no kernel runs here."""

import itertools
import math

import pytest
import torch
from paamops.triton_kernels.cumulative_threshold import TILE, launch_size
from paamops.triton_kernels.tiling import tiling

SHAPES = [
    (1, 1),
    (3, 5),
    (2, 3, 1, 1),
    (64, 256, 56, 56),
    (1, 3, 224, 224),
    (256, 512, 7, 7),
    (8, 20, 4, 6, 6),
    (1, 1, 2**20),
]
FORMATS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def plan_of(*tensors, processors=108):
    return tiling(tensors[0].shape, [x.stride() for x in tensors], tensors[0].itemsize, processors)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_covered_and_found(shape, layout):
    x = FORMATS[layout](torch.empty(shape, device="meta"))
    plan = plan_of(x)
    rows, cols = plan.constexprs["ROWS"], plan.constexprs["COLS"]
    assert plan.images * plan.rows * plan.cols == x.numel()
    assert plan.span % cols == 0
    assert (plan.chunks - 1) * plan.span < plan.cols <= plan.chunks * plan.span
    assert plan.programs == plan.images * math.ceil(plan.rows / rows) * plan.chunks
    assert rows & (rows - 1) == cols & (cols - 1) == 0
    assert rows * cols <= 2048
    # The last element lies where the tensor says.
    image, row, s0, s1, s2 = plan.strides[0]
    d1, d2 = plan.inner
    d0 = plan.cols // (d1 * d2)
    place = (plan.images - 1) * image + (plan.rows - 1) * row + (d0 - 1) * s0 + (d1 - 1) * s1 + (d2 - 1) * s2
    assert place == sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@pytest.mark.parametrize(
    ("x", "layout", "align"),
    [
        (torch.empty(64, 256, 56, 56, device="meta"), "columns", 16),
        (torch.empty(64, 256, 14, 14, device="meta"), "columns", 4),
        (torch.empty(64, 256, 7, 7, device="meta"), "columns", 1),
        (torch.empty(64, 256, 56, 56, device="meta")[:, :100], "columns", 16),
        (FORMATS["channels_last"](torch.empty(2, 24, 7, 7, device="meta")), "rows", 8),
        (FORMATS["channels_last"](torch.empty(2, 3, 7, 7, device="meta")), "rows", 1),
        (torch.empty(2, 256 + 4, device="meta")[:, :256].view(2, 16, 4, 4), "columns", 4),
        (torch.empty(16, 32, device="meta"), "rows", 16),
        (torch.empty(1, 1, 32, 32, device="meta"), "columns", 16),
        (torch.empty(16, 32, device="meta")[:, ::2], "columns", 1),
        (torch.empty(1, 1, 32, device="meta")[..., ::2], "rows", 1),
        (torch.empty(1, 1, device="meta"), "rows", 1),
        (torch.empty(2, 3, 8, 8, device="meta").transpose(2, 3), "strided", 1),
        (torch.empty(2, 3, 8, 8, device="meta")[..., ::2], "strided", 1),
    ],
)
def test_layout_and_alignment(x, layout, align):
    plan = plan_of(x)
    assert (plan.layout, plan.constexprs["ALIGN"]) == (layout, align)


def test_tensors_that_differ_are_walked_together():
    x = torch.empty(2, 16, 8, 8, device="meta")
    assert plan_of(x, FORMATS["channels_last"](x)).layout == "strided"
    sliced = torch.empty(2, 32, 8, 8, device="meta")[:, ::2]
    plan = plan_of(x, sliced)
    assert (plan.images, plan.rows, plan.layout) == (1, 32, "columns")
    plan = plan_of(x, torch.empty(2, 17, 8, 8, device="meta")[:, 1:])
    assert (plan.images, plan.rows, plan.layout) == (2, 16, "columns")


def test_long_rows_are_split_and_many_rows_are_not():
    assert plan_of(torch.empty(1, 1, 4096, 4096, device="meta")).programs >= 108
    assert plan_of(torch.empty(64, 256, 56, 56, device="meta")).chunks == 1
    one = plan_of(torch.empty(1, 1, 4096, 4096, device="meta"), processors=1)
    assert one.programs < plan_of(torch.empty(1, 1, 4096, 4096, device="meta"), processors=132).programs


def test_too_many_dimensions_that_do_not_merge():
    assert plan_of(torch.empty(2, 2, 2, 3, 4, 5, device="meta").permute(0, 1, 5, 4, 3, 2)) is None


@pytest.mark.parametrize(
    ("count", "processors"), [*itertools.product([1, TILE, TILE + 1, 26_560, 10**6, 2**31 + 5], [1, 108])]
)
def test_threshold_launch_covers_all_scores(count, processors):
    programs, span = launch_size(count, processors)
    assert (programs - 1) * span < count <= programs * span
    assert span % TILE == 0
    assert programs <= 4 * processors
