"""filter_norms: l1 and l2 norms against float64, of every kind of layer, layout, dtype and size, in one call."""

import math

import pytest
import torch

from paamops.ops.filter_norms import filter_norms, filter_norms_op, filter_norms_reference
from paamops.ops.registration import build_info, compiled
from tests.filters import DTYPES, KINDS, LAYOUTS, chance_of, draw, random_layers, rows_of
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import accumulator, assert_close

IMPLEMENTATIONS = {"kernel": filter_norms_op, "reference": filter_norms_reference}
has_cpp = build_info()["kernels"]["filter_norms"]["cpu"] == "C++"
needs_cpp = pytest.mark.skipif(not has_cpp, reason="built without C++")


def expected(weights, axes, groups, p):
    rows = [rows_of(*layer) for layer in zip(weights, axes, groups, strict=True)]
    return torch.cat([(each.abs() ** p).sum(1) ** (1 / p) for each in rows])


def check(op, weights, axes, groups):
    for p in (1, 2):
        norms = op(weights, axes, groups, p)
        right = expected(weights, axes, groups, p)
        assert (norms.shape, norms.dtype) == (right.shape, accumulator(weights[0].dtype))
        assert norms.is_contiguous()
        assert_close(norms, right, norms.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout, implementation):
    for shape, axis, groups in KINDS:
        if math.prod(shape):
            print(shape, axis, groups)
            check(IMPLEMENTATIONS[implementation], [LAYOUTS[layout](draw(shape, dtype))], [axis], [groups])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kinds_in_one_call(dtype, implementation):
    """With layers without filters, and filters without weights, whose norm is 0."""
    weights = [draw(shape, dtype) for shape, _, _ in KINDS]
    check(IMPLEMENTATIONS[implementation], weights, [axis for _, axis, _ in KINDS], [group for _, _, group in KINDS])


@pytest.mark.parametrize("repeat", range(20))
def test_random_lists(repeat, seed):
    check(filter_norms_op, *random_layers(chance_of(seed, repeat)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
@needs_cpp
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for layout in LAYOUTS.values():
            layers = [(layout(draw(shape, dtype)), axis, group) for shape, axis, group in KINDS if math.prod(shape)]
            check(filter_norms_op, *map(list, zip(*layers, strict=True)))
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_filters(implementation):
    """Longer than a block of sums, and than a task; of equal weights, whose rounding errors have one sign, too."""
    for shape in [(3, 4100), (2, 300, 15, 15), (2, 131_073)]:
        for weight in (draw(shape), torch.full(shape, 0.1)):
            check(IMPLEMENTATIONS[implementation], [weight], [0], [1])
    check(IMPLEMENTATIONS[implementation], [draw((140_000, 3))], [1], [2])


def test_an_example_by_hand():
    convolution = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]], [[-1.0, 0.0]]])  # three filters of 1 x 2
    transposed = torch.tensor([[1.0, -2.0], [3.0, 4.0]])  # in x out: filters (1, 3) and (-2, 4)
    assert filter_norms([convolution], p=1).tolist() == [7, 0, 1]
    assert filter_norms([convolution]).tolist() == [5, 0, 1]
    assert filter_norms([convolution, transposed], [0, 1], p=1).tolist() == [7, 0, 1, 4, 6]
    assert filter_norms([transposed], [1], [2], p=1).tolist() == [1, 2, 3, 4]  # a group for each input channel


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, implementation):
    """NaN and infinities stay in their filter, wherever in it they are."""
    for place in (0, 17, 35):
        for axis, layout in ((0, "contiguous"), (1, "contiguous"), (0, "transposed")):
            rows = draw((7, 36), dtype)
            rows[2, place], rows[4, place] = math.nan, -math.inf
            weight = LAYOUTS[layout](rows if axis == 0 else rows.t().contiguous())
            for p in (1, 2):
                norms = IMPLEMENTATIONS[implementation]([weight], [axis], [1], p)
                assert norms[2].isnan()
                assert norms[4] == math.inf
                assert_close(norms, expected([weight], [axis], [1], p), norms.dtype)
    zeros = IMPLEMENTATIONS[implementation]([-torch.zeros(3, 5, dtype=dtype)], [0], [1], 2)
    assert zeros.tolist() == [0, 0, 0]


def test_largest_float16():
    """Sums and squares are float32: they do not overflow where the weights' dtype would."""
    weight = torch.full((2, 40), 60000.0, dtype=torch.float16)
    assert filter_norms([weight], p=1).tolist() == [40 * 60000.0] * 2
    torch.testing.assert_close(filter_norms([weight]), torch.full((2,), 60000.0 * math.sqrt(40)))


def test_weights_are_left_alone_and_detached():
    weight = draw((4, 3, 2)).requires_grad_()
    before = weight.detach().clone()
    norms = filter_norms([weight])
    assert not norms.requires_grad
    assert torch.equal(weight, before)


W = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"weights is a Tensor; it must be a list of tensors", {"weights": W}),
        (ValueError, r"weights is empty; it must have at least one layer", {"weights": []}),
        (TypeError, r"weights\[1\] is a list; it must be a tensor", {"weights": [W, []]}),
        (TypeError, r"weights\[0\] has dtype torch\.int64; it must be float16", {"weights": [W.long(), W]}),
        (TypeError, r"weights\[1\] has .*float64; .* first, torch\.float32", {"weights": [W, W.double()]}),
        (ValueError, r"weights\[1\] is on meta; it must be on cpu", {"weights": [W, W.to("meta")]}),
        (TypeError, r"axes is a int; it must be a list of whole numbers", {"axes": 0}),
        (ValueError, r"axes has 1 entries; it must have one for each layer, 2", {"axes": [0]}),
        (TypeError, r"axes\[1\] is a float; it must be a whole number", {"axes": [0, 1.0]}),
        (TypeError, r"axes\[0\] is a bool; it must be a whole number", {"axes": [True, 1]}),
        (ValueError, r"axes\[1\] is 2; it must be 0 or 1", {"axes": [0, 2]}),
        (ValueError, r"axes\[1\] is -1; it must be 0 or 1", {"axes": [0, -1]}),
        (ValueError, r"weights\[0\] has shape \(3,\); .* axis 1", {"weights": [W[0], W], "axes": [1, 1]}),
        (ValueError, r"weights\[0\] has shape \(\); .* axis 0", {"weights": [W.sum(), W]}),
        (ValueError, r"groups has 3 entries; .* 2", {"groups": [1, 1, 1]}),
        (ValueError, r"groups\[1\] is 2; it must be 1 where the filters lie along axis 0", {"groups": [1, 2]}),
        (ValueError, r"groups\[0\] is 3; .* first dimension, 4", {"axes": [1, 0], "groups": [3, 1]}),
        (ValueError, r"groups\[0\] is 0; .* first dimension, 4", {"axes": [1, 0], "groups": [0, 1]}),
        (ValueError, r"p is 3; it must be 1 or 2", {"p": 3}),
        (ValueError, r"p is True; it must be 1 or 2", {"p": True}),
        (ValueError, r"p is '2'; it must be 1 or 2", {"p": "2"}),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        filter_norms(**{"weights": [W, W], **changed})


@needs_cpp
def test_the_kernel_checks_what_it_would_read_out_of_bounds():
    for axes, groups, words in [([2], [1], "axes"), ([0], [2], "groups"), ([1], [3], "groups"), ([0, 0], [1], "axes")]:
        with pytest.raises(RuntimeError, match=words):
            filter_norms_op([W], axes, groups, 2)
    with pytest.raises(RuntimeError, match="p must be"):
        filter_norms_op([W], [0], [1], 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    weights = [draw((4, 3, 2), dtype), LAYOUTS["transposed"](draw((6, 5, 3), dtype)), draw((0, 3), dtype)]
    for p in (1, 2):
        torch.library.opcheck(filter_norms_op, (weights, [0, 1, 0], [1, 3, 1], p))


def test_under_torch_compile():
    weights = [draw((4, 3, 2)), draw((6, 5))]
    step = torch.compile(lambda w: filter_norms(w, [0, 1], [1, 2]) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(weights), 2 * filter_norms(weights, [0, 1], [1, 2]))


@needs_cpp
def test_same_bits_in_every_run_and_for_every_number_of_threads():
    threads = torch.get_num_threads()
    weights = [draw(shape) for shape, _, _ in KINDS] + [draw((300, 64, 3, 3)), draw((4, 90_000)), draw((200, 300))]
    axes, groups = [axis for _, axis, _ in KINDS] + [0, 0, 1], [group for _, _, group in KINDS] + [1, 1, 2]
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append([filter_norms_op(weights, axes, groups, p) for p in (1, 2)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
