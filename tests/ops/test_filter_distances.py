"""filter_distances: sums of distances against all differences in float64; near filters, far from 0, lose nothing."""

import math

import pytest
import torch

from paamops.ops.filter_distances import filter_distances, filter_distances_op, filter_distances_reference
from paamops.ops.registration import build_info, compiled
from tests.filters import DTYPES, KINDS, LAYOUTS, chance_of, draw, random_layers, rows_of
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import accumulator, assert_close

IMPLEMENTATIONS = {"kernel": filter_distances_op, "reference": filter_distances_reference}
has_cpp = build_info()["kernels"]["filter_distances"]["cpu"] == "C++"
needs_cpp = pytest.mark.skipif(not has_cpp, reason="built without C++")


def expected(weights, axes, groups):
    """Filter by filter, from the differences to all others of its layer."""
    sums = []
    for layer in zip(weights, axes, groups, strict=True):
        rows = rows_of(*layer)
        for f, row in enumerate(rows):
            others = torch.cat([rows[:f], rows[f + 1 :]])
            sums.append((others - row).square().sum(1).sqrt().sum())
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.float64)


def check(op, weights, axes, groups):
    sums, right = op(weights, axes, groups), expected(weights, axes, groups)
    assert (sums.shape, sums.dtype) == (right.shape, accumulator(weights[0].dtype))
    assert sums.is_contiguous()
    assert_close(sums, right, sums.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout, implementation):
    layers = [(LAYOUTS[layout](draw(shape, dtype)), axis, group) for shape, axis, group in KINDS if math.prod(shape)]
    check(IMPLEMENTATIONS[implementation], *map(list, zip(*layers, strict=True)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_layers_and_filters(implementation):
    """A layer without filters adds none; filters without weights, and a single one, are at distance 0."""
    weights = [draw(shape) for shape, _, _ in KINDS]
    check(IMPLEMENTATIONS[implementation], weights, [axis for _, axis, _ in KINDS], [group for _, _, group in KINDS])
    assert IMPLEMENTATIONS[implementation]([draw((1, 9)), draw((4, 0))], [0, 0], [1, 1]).tolist() == [0] * 5
    assert IMPLEMENTATIONS[implementation]([draw((0, 9))], [0], [1]).shape == (0,)


@pytest.mark.parametrize("repeat", range(20))
def test_random_lists(repeat, seed):
    check(filter_distances_op, *random_layers(chance_of(seed, repeat), most=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
@needs_cpp
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for layout in ("contiguous", "transposed", "every second weight"):
            layers = [(LAYOUTS[layout](draw(s, dtype)), axis, group) for s, axis, group in KINDS if math.prod(s)]
            check(filter_distances_op, *map(list, zip(*layers, strict=True)))
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_filters_far_from_zero(dtype, implementation):
    """Filters that differ by a millionth of their size: |a|² + |b|² - 2 ab would be off by more than their distance."""
    centre = draw((1, 300), dtype, 10)
    weight = centre + draw((70, 300), dtype, 1e-5)
    weight[3] = weight[2]  # and twins, at distance 0
    check(IMPLEMENTATIONS[implementation], [weight], [0], [1])
    gram = weight @ weight.t()
    by_gram = (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).clamp(min=0).sqrt().sum(1)
    right = expected([weight], [0], [1])
    if dtype == torch.float32:
        assert ((by_gram - right).abs() / right).max() > 0.01, "the test must tell them apart"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clusters(implementation):
    """Twins within far clusters, filters of very different sizes, all equal ones."""
    centres = draw((3, 50), scale=100)
    weight = centres[torch.randint(3, (90,))] + draw((90, 50), scale=1e-3)
    check(IMPLEMENTATIONS[implementation], [weight, weight * 10 ** torch.linspace(-6, 4, 90)[:, None]], [0, 0], [1, 1])
    assert IMPLEMENTATIONS[implementation]([centres[:1].expand(70, 50)], [0], [1]).tolist() == [0] * 70


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_filters(implementation):
    """Of more weights than are laid out at a time; with equal differences, whose rounding errors have one sign."""
    for weight in (draw((66, 1100)), 0.1 * torch.arange(66.0)[:, None].expand(66, 1100), draw((3, 20_000))):
        check(IMPLEMENTATIONS[implementation], [weight], [0], [1])


def test_an_example_by_hand():
    """The corners of a rectangle of 3 x 4, and the middle, which is nearest to all."""
    corners = torch.tensor([[0.0, 0], [3, 0], [0, 4], [3, 4], [1.5, 2]])
    assert filter_distances([corners]).tolist() == [14.5] * 4 + [10]
    assert filter_distances([corners.t()], [1]).tolist() == [14.5] * 4 + [10]
    # Two groups of a transposed convolution are one layer: filters 0, 3 and 4, 1.
    assert filter_distances([torch.tensor([[0.0, 3], [4, 1]])], [1], [2]).tolist() == [8, 6, 8, 6]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, implementation):
    """What is infinitely far is so for all of its layer; NaN likewise; other layers are untouched."""
    for value in (math.inf, -math.inf, math.nan):
        for place in (0, 35):
            spoilt, whole = draw((70, 36), dtype), draw((5, 36), dtype)
            spoilt[66, place] = value
            sums = IMPLEMENTATIONS[implementation]([spoilt, whole], [0, 0], [1, 1])
            assert (sums[:70].isnan() if math.isnan(value) else sums[:70] == math.inf).all()
            assert_close(sums[70:], expected([whole], [0], [1]), sums.dtype)
    both = draw((3, 4), dtype)
    both[:2, 1] = math.inf
    check(IMPLEMENTATIONS[implementation], [both], [0], [1])  # inf - inf is NaN
    lone = torch.full((1, 4), math.inf, dtype=dtype)
    assert IMPLEMENTATIONS[implementation]([lone], [0], [1]).tolist() == [0]  # it has no others


def test_largest_float16():
    """Differences are float32: they do not overflow where the weights' dtype would."""
    weight = torch.tensor([[60000.0] * 9, [-60000.0] * 9], dtype=torch.float16)
    assert filter_distances([weight]).tolist() == [3 * 2 * 60000.0] * 2


def test_weights_are_left_alone_and_detached():
    weight = draw((4, 3, 2)).requires_grad_()
    before = weight.detach().clone()
    assert not filter_distances([weight]).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"weights is a Tensor; it must be a list", (torch.ones(2, 3),)),
        (ValueError, r"weights is empty", ([],)),
        (TypeError, r"weights\[0\] has dtype torch\.int64", ([torch.ones(2, 3).long()],)),
        (ValueError, r"axes\[0\] is 2; it must be 0 or 1", ([torch.ones(2, 3)], [2])),
        (ValueError, r"groups\[0\] is 4; it must divide the first dimension, 6", ([torch.ones(6, 3)], [1], [4])),
    ],
)
def test_bad_arguments(error, words, arguments):
    with pytest.raises(error, match=words):
        filter_distances(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    weights = [draw((4, 3, 2), dtype), LAYOUTS["transposed"](draw((6, 5, 3), dtype)), draw((0, 3), dtype)]
    torch.library.opcheck(filter_distances_op, (weights, [0, 1, 0], [1, 3, 1]))


def test_under_torch_compile():
    weights = [draw((4, 3, 2)), draw((6, 5))]
    step = torch.compile(lambda w: filter_distances(w, [0, 1], [1, 2]) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(weights), 2 * filter_distances(weights, [0, 1], [1, 2]))


@needs_cpp
def test_same_bits_in_every_run_and_for_every_number_of_threads():
    threads = torch.get_num_threads()
    weights = [draw((300, 200)), draw((130, 64, 3, 3)), draw((20, 65, 3))]
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(filter_distances_op(weights, [0, 0, 1], [1, 1, 2]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])
