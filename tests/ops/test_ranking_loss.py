"""ranking_loss: Φ and its gradients against every term of the formula in float64, at every scale, dtype and size."""

import itertools
import math
import random

import pytest
import torch

from paamops.ops.ranking_loss import (
    check_ranking,
    ranking_loss,
    ranking_loss_backward_op,
    ranking_loss_backward_reference,
    ranking_loss_op,
    ranking_loss_reference,
)
from paamops.ops.registration import build_info, compiled
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import TOLERANCE, accumulator, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IMPLEMENTATIONS = {
    "kernel": (ranking_loss_op, ranking_loss_backward_op),
    "reference": (ranking_loss_reference, ranking_loss_backward_reference),
}
# Images, channels and top: fewer and more than a vector of images, of channels, and than a block of sums.
SHAPES = [
    (1, 1, 1),
    (1, 2, 1),
    (3, 2, 2),
    (16, 16, 8),
    (17, 5, 3),
    (33, 31, 31),
    (8, 33, 32),
    (40, 64, 26),
    (5, 65, 64),
    (2, 129, 128),
    (19, 200, 1),
    (7, 300, 299),
]
RESNET_56 = [16] * 19 + [32] * 18 + [64] * 18
has_cpp = build_info()["kernels"]["ranking_loss"]["cpu"] == "C++"
needs_cpp = pytest.mark.skipif(not has_cpp, reason="built without C++")


def expected(saliency, ranking, top):
    """Of one layer, from all C² differences, which lose nothing: Φ, and Σ_{j ≤ m, j < top} exp(y_m - LSE_j), (N, C)."""
    ranked = saliency.detach().double().cpu()[:, ranking.cpu()]
    channels = ranked.shape[1]
    beaten = torch.ones(channels, channels, dtype=torch.bool).tril(-1)[:top]
    rows = ranked[:, None, :].expand(-1, top, -1).masked_fill(beaten, -math.inf)
    terms = (rows - ranked[:, :top, None]).logsumexp(2)
    loss = terms.sum(1).mean() if len(terms) else terms.sum()
    return loss, rows.softmax(2).sum(1)


def check_gradient(gradient, saliency, ranking, top, upper=1.0, slack=1.0, share=None):
    """∂y_m = (share_m - [m < top]) · upper / N, relative to what it is the difference of, which may cancel."""
    assert (gradient.shape, gradient.dtype) == (saliency.shape, saliency.dtype)
    assert gradient.is_contiguous()
    share = expected(saliency, ranking, top)[1] if share is None else share
    wanted = share.clone()
    wanted[:, :top] -= 1
    actual = gradient.double().cpu()[:, ranking.cpu()] * (len(saliency) / upper)
    scale = slack * (1 + share)
    assert_close(actual / scale, wanted / scale, saliency.dtype)


def check(op, backward, saliencies, rankings, tops):
    """Φ and the gradients of all layers; every term of Φ is positive, so that its relative error is bounded.

    The reference computes in float64 and keeps log-sum-exps whole, so in float64 its error grows with the saliencies.
    """
    slack = 1.0
    if op is ranking_loss_reference and saliencies[0].dtype == torch.float64:
        slack = 100 * (1 + max(saliency.abs().max().item() for saliency in saliencies))
    phi = op(saliencies, rankings, tops)
    assert (phi.shape, phi.dtype) == ((), accumulator(saliencies[0].dtype))
    losses, shares = zip(*map(expected, saliencies, rankings, tops), strict=True)
    assert_close(phi / slack, sum(losses) / slack, phi.dtype)
    upper = -3.0
    grads = backward(phi.new_full((), upper), saliencies, rankings, tops)
    for gradient, saliency, ranking, top, share in zip(grads, saliencies, rankings, tops, shares, strict=True):
        check_gradient(gradient, saliency, ranking, top, upper, slack, share)


def draw(images, channels, dtype=torch.float32, scale=1.0):
    """A saliency, within what float16 holds at a scale of 1e4, and a ranking of its own."""
    return (torch.randn(images, channels, dtype=torch.float64).clamp(-4, 4) * scale).to(dtype), torch.randperm(channels)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, implementation):
    for images, channels, top in SHAPES:
        print(images, channels, top)
        saliency, ranking = draw(images, channels, dtype)
        check(*IMPLEMENTATIONS[implementation], [saliency], [ranking], [top])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0, 1e3, 1e4])
def test_scales(scale, dtype, implementation):
    """From all alike to so far apart that one channel takes all."""
    for images, channels, top in [(17, 20, 9), (3, 150, 150)]:
        for shift in (0.0, scale):
            saliency, ranking = draw(images, channels, dtype, scale)
            check(*IMPLEMENTATIONS[implementation], [saliency + shift], [ranking], [top])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orders(dtype, implementation):
    """Saliencies that rise and fall with the rank, by steps from tiny to large; ties, some and all."""
    ramp = torch.arange(140, dtype=torch.float64)
    for step in (1e-6, 1e-3, 0.5, 0.999, 1.001, 3.0, 100.0):
        for ranked in (-step * ramp, step * ramp, (ramp % 7) * step, step * (ramp - 70).abs()):
            ranking = torch.randperm(140)
            saliency = torch.empty(2, 140, dtype=torch.float64)
            saliency[:, ranking] = torch.stack([ranked, ranked.flip(0)])
            check(*IMPLEMENTATIONS[implementation], [saliency.to(dtype)], [ranking], [100])
    check(*IMPLEMENTATIONS[implementation], [torch.zeros(3, 140, dtype=dtype)], [torch.randperm(140)], [139])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_channels(implementation):
    """Sums of many terms keep their precision, of equal steps too, whose rounding errors have one sign."""
    for spread in (0.0, 1e-6, 2.0**-20, 1e-2, 3.0):
        saliency = torch.stack([torch.randn(1000), spread * torch.arange(1000.0), -spread * torch.arange(1000.0)])
        check(*IMPLEMENTATIONS[implementation], [saliency], [torch.arange(1000)], [990])
    saliency = torch.stack([torch.randn(4096), 2.0**-20 * torch.arange(4096.0), torch.full((4096,), 0.3)])
    check(*IMPLEMENTATIONS[implementation], [saliency], [torch.arange(4096)], [100])


@pytest.mark.parametrize("repeat", range(20))
def test_random_lists(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    dtype, scale = chance.choice(DTYPES), 10 ** chance.uniform(-3, 3)
    shapes = [(chance.randint(0, 40), chance.randint(1, 90)) for _ in range(chance.randint(1, 6))]
    tops = [chance.randint(1, channels) for _, channels in shapes]
    print(shapes, tops, dtype, scale)
    layers = [draw(*shape, dtype, scale) for shape in shapes]
    check(*IMPLEMENTATIONS["kernel"], [s for s, _ in layers], [r for _, r in layers], tops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
@needs_cpp
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for scale in (1e-3, 1.0, 1e3):
            for images, channels, top in SHAPES:
                saliency, ranking = draw(images, channels, dtype, scale)
                check(ranking_loss_op, ranking_loss_backward_op, [saliency], [ranking], [top])
    finally:
        compiled.use_instruction_set(best)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second channel": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1)[:, ::2],
    "inside a larger one": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 1), value=math.nan)[1:-1, 2:-3],
    "backwards images": lambda x: x.flip(0)[torch.arange(len(x)).flip(0)],
    "one image expanded": lambda x: x[:1].expand_as(x),
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for dtype in DTYPES:
        for images, channels, top in [(19, 33, 12), (5, 1, 1), (1, 6, 6)]:
            saliency, ranking = draw(images, channels, dtype)
            apart = torch.stack([ranking, ranking], 1)[:, 0]  # strided, too
            check(*IMPLEMENTATIONS[implementation], [LAYOUTS[layout](saliency)], [apart], [top])


def test_an_example_by_hand():
    """Two images, three channels; channel 2 first, then 0, then 1; exponentials 1, 2 and 3."""
    saliency = torch.tensor([[2.0, 1.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    ranking = torch.tensor([2, 0, 1])
    one = math.log(6 / 3) + math.log(3 / 2)  # of the first image; of the second log 3 + log 2
    torch.testing.assert_close(ranking_loss(saliency, ranking, 2).item(), (one + math.log(6)) / 2)
    torch.testing.assert_close(ranking_loss(saliency, ranking, 1).item(), (math.log(2) + math.log(3)) / 2)
    torch.testing.assert_close(ranking_loss(saliency, ranking, 3), ranking_loss(saliency, ranking, 2))  # log 1 = 0
    saliency.requires_grad_()
    ranking_loss(saliency, ranking, 2).backward()
    first = [2 / 6 + 2 / 3 - 1, 1 / 6 + 1 / 3, 3 / 6 - 1]
    second = [1 / 3 + 1 / 2 - 1, 1 / 3 + 1 / 2, 1 / 3 - 1]
    wanted = torch.tensor([first, second], dtype=torch.float64) / 2
    assert_close(saliency.grad, wanted, torch.float64)


def test_what_the_loss_is_about():
    """Near 0 for saliencies in the order of the ranking with wide gaps; a swap within the top raises it, one below does
    not; a constant added to an image changes nothing; all alike cost log(C! / (C - top)!).
    """
    channels, top = 12, 5
    ranking = torch.randperm(channels)
    saliency = torch.empty(4, channels, dtype=torch.float64)
    saliency[:, ranking] = -40.0 * torch.arange(channels, dtype=torch.float64)
    assert 0 <= ranking_loss(saliency, ranking, top) < 1e-15
    for one, other in itertools.combinations(range(channels), 2):
        swapped = saliency.clone()
        swapped[:, ranking[[one, other]]] = saliency[:, ranking[[other, one]]]
        if one < top:
            assert ranking_loss(swapped, ranking, top) > 39
        else:
            assert ranking_loss(swapped, ranking, top) < 1e-15
    noisy = torch.randn(4, channels, dtype=torch.float64)
    shifted = noisy + torch.randn(4, 1, dtype=torch.float64) * 10
    torch.testing.assert_close(ranking_loss(shifted, ranking, top), ranking_loss(noisy, ranking, top))
    alike = ranking_loss(torch.full((4, channels), 0.5), ranking, top)
    assert_close(alike, torch.tensor(math.log(math.perm(channels, top))), torch.float32)
    assert ranking_loss(torch.randn(9, 1), torch.tensor([0]), 1) == 0
    one = ranking_loss(noisy, ranking, 1)
    torch.testing.assert_close(one, -noisy.log_softmax(1)[:, ranking[0]].mean())


def test_descent_brings_the_images_to_the_ranking():
    ranking = torch.randperm(8)
    saliency = torch.randn(6, 8, requires_grad=True)
    for _ in range(400):
        (grad,) = torch.autograd.grad(ranking_loss(saliency, ranking, 4), saliency)
        saliency.data -= 3 * grad
    assert torch.equal(saliency.argsort(1, descending=True)[:, :4], ranking[:4].expand(6, 4))


def test_the_printed_form():
    """Invariant to the order of the top channels, unlike ours; equal to ours for a top of one of one."""
    saliency, ranking = draw(7, 9, torch.float64)
    printed = ranking_loss_reference([saliency], [ranking], [4], literal=True)
    top = saliency[:, ranking[:4]]
    assert_close(printed, -top.log_softmax(1).sum(1).mean(), torch.float64)
    swapped = ranking[[3, 1, 0, 2, *range(4, 9)]]
    torch.testing.assert_close(ranking_loss_reference([saliency], [swapped], [4], literal=True), printed)
    ours, theirs = (ranking_loss_reference([saliency], [r], [4]) for r in (ranking, swapped))
    assert (ours - theirs).abs() > 1e-9
    assert ranking_loss_reference([saliency], [ranking], [1], literal=True) == 0
    saliency.requires_grad_()
    torch.autograd.gradcheck(lambda s: ranking_loss_reference([s], [ranking], [4], literal=True), saliency)


def test_the_whole_list_is_the_sum_of_its_layers():
    tops = [max(1, channels // 3) for channels in RESNET_56]
    saliencies, rankings = zip(*[draw(12, channels) for channels in RESNET_56], strict=True)
    phi = ranking_loss(saliencies, rankings, tops)
    layers = list(zip(saliencies, rankings, tops, strict=True))
    assert_close(phi, sum(ranking_loss(*layer).double() for layer in layers), torch.float32)
    grads = ranking_loss_backward_op(torch.ones(()), saliencies, rankings, tops)
    for gradient, (saliency, ranking, top) in zip(grads, layers, strict=True):
        assert torch.equal(gradient, ranking_loss_backward_op(torch.ones(()), [saliency], [ranking], [top])[0])


def test_without_images():
    ranking = torch.randperm(5)
    for dtype in DTYPES:
        assert ranking_loss(torch.empty(0, 5, dtype=dtype), ranking, 2) == 0
        saliency, order = draw(3, 4, dtype)
        empty = torch.empty(0, 5, dtype=dtype, requires_grad=True)
        phi = ranking_loss([empty, saliency.requires_grad_()], [ranking, order], [2, 3])
        torch.testing.assert_close(phi, ranking_loss(saliency, order, 3))
        phi.backward()
        assert empty.grad.shape == (0, 5)
        check_gradient(saliency.grad, saliency, order, 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, implementation):
    """NaN stays within its image; -inf below the top is a channel that is not there."""
    op, backward = IMPLEMENTATIONS[implementation]
    one = torch.ones((), dtype=accumulator(dtype))
    for rank in (0, 3, 5, 19):
        saliency, ranking = draw(18, 20, dtype)
        saliency[17, ranking[rank]] = math.nan
        assert op([saliency], [ranking], [5]).isnan()
        (gradient,) = backward(one, [saliency], [ranking], [5])
        assert gradient[17].isnan().all()
        check_gradient(gradient[:17] * (18 / 17), saliency[:17], ranking, 5)

    saliency, ranking = draw(18, 20, dtype)
    saliency[:, ranking[[6, 18, 19]]] = -math.inf
    there = ranking[[*range(6), *range(7, 18)]]
    relabelled = there.argsort().argsort()
    (gradient,) = backward(one, [saliency], [ranking], [5])
    assert not gradient[:, ranking[[6, 18, 19]]].any()
    rest = saliency[:, there.sort().values].contiguous()
    assert_close(op([saliency], [ranking], [5]), expected(rest, relabelled, 5)[0], accumulator(dtype))
    check_gradient(gradient[:, there.sort().values].contiguous(), rest, relabelled, 5)

    saliency[2, ranking[1]] = -math.inf  # within the top
    assert op([saliency], [ranking], [5]) == math.inf
    for rank in (0, 4, 10):
        saliency, ranking = draw(3, 20, dtype)
        saliency[1, ranking[rank]] = math.inf
        assert not op([saliency], [ranking], [5]).isfinite()


def test_largest_float16():
    """The sum is float32: it does not overflow where the saliencies' dtype would."""
    saliency = torch.full((2, 40), 60000.0, dtype=torch.float16)
    saliency[:, 0] = -60000.0
    phi = ranking_loss(saliency, torch.arange(40), 40)
    torch.testing.assert_close(phi.item(), 120000 + math.log(math.factorial(39)) + math.log(39), rtol=1e-6, atol=0)


def test_gradients_through_autograd():
    for dtype in DTYPES:
        saliencies, rankings = zip(*[draw(4, channels, dtype) for channels in (3, 9)], strict=True)
        for saliency in saliencies:
            saliency.requires_grad_()
        phi = ranking_loss(saliencies, rankings, [2, 9])
        (phi.double() * 2.5).backward()
        for saliency, ranking, top in zip(saliencies, rankings, [2, 9], strict=True):
            check_gradient(saliency.grad, saliency, ranking, top, 2.5)
    frozen, learned = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    ranking_loss([frozen, learned], [torch.arange(3)] * 2, [1, 1]).backward()
    check_gradient(learned.grad, learned.detach(), torch.arange(3), 1)
    same = torch.randn(2, 3, requires_grad=True)  # one tensor for two layers
    ranking_loss([same, same], [torch.arange(3)] * 2, [1, 1]).backward()
    check_gradient(same.grad, same.detach(), torch.arange(3), 1, 2.0)


def test_inputs_are_left_as_they_are():
    for layout in (*LAYOUTS.values(), lambda x: x):
        saliency, ranking = layout(torch.randn(18, 20)), torch.randperm(20)
        copies = saliency.clone(), ranking.clone()
        ranking_loss_op([saliency], [ranking], [7])
        ranking_loss_backward_op(torch.ones(()), [saliency], [ranking], [7])
        assert torch.equal(saliency, copies[0])
        assert torch.equal(ranking, copies[1])


THREE = torch.arange(3)
GOOD = {"saliencies": [torch.zeros(2, 3), torch.zeros(4, 2)], "rankings": [THREE, torch.arange(2)]}


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"saliencies is a set; it must be a list of tensors", {"saliencies": set()}),
        (TypeError, r"rankings is a Tensor; it must be a list of tensors", {"rankings": torch.arange(3)}),
        (TypeError, r"tops is a int; it must be a list of whole numbers", {"tops": 1}),
        (ValueError, r"saliencies is empty; it must have at least one layer", {"saliencies": []}),
        (ValueError, r"rankings has 1 entries; it must have one for each layer, 2", {"rankings": [torch.arange(3)]}),
        (ValueError, r"tops has 3 entries; it must have one for each layer, 2", {"tops": [1, 1, 1]}),
        (TypeError, r"saliencies\[1\] is a list; it must be a tensor", {"saliencies": [torch.zeros(2, 3), []]}),
        (TypeError, r"saliencies\[0\] has dtype torch\.int64; .* float16", {"saliencies": [torch.arange(3)[None]] * 2}),
        (
            TypeError,
            r"saliencies\[1\] has dtype torch\.float64; it must be that of the first, torch\.float32",
            {"saliencies": [torch.zeros(2, 3), torch.zeros(4, 2).double()]},
        ),
        (
            ValueError,
            r"saliencies\[1\] has shape \(4, 2, 1\); .* two dimensions, \(N, C\)",
            {"saliencies": [torch.zeros(2, 3), torch.zeros(4, 2, 1)]},
        ),
        (
            ValueError,
            r"saliencies\[1\] is on meta; it must be on cpu",
            {"saliencies": [torch.zeros(2, 3), torch.zeros(4, 2, device="meta")]},
        ),
        (TypeError, r"rankings\[1\] is a list", {"rankings": [torch.arange(3), [0, 1]]}),
        (TypeError, r"rankings\[1\] has dtype torch\.int32; .* int64", {"rankings": [THREE, torch.arange(2).int()]}),
        (ValueError, r"rankings\[1\] has shape \(3,\); .* saliencies\[1\], \(2,\)", {"rankings": [THREE] * 2}),
        (
            ValueError,
            r"rankings\[0\] is on meta; it must be on cpu",
            {"rankings": [torch.arange(3, device="meta"), torch.arange(2)]},
        ),
        (ValueError, r"rankings\[1\] has 1 several .* of 0 … 1", {"rankings": [THREE, torch.ones(2).long()]}),
        (ValueError, r"rankings\[0\] has 3 among", {"rankings": [torch.tensor([0, 3, 1]), torch.arange(2)]}),
        (ValueError, r"rankings\[0\] has -1 among", {"rankings": [torch.tensor([0, -1, 1]), torch.arange(2)]}),
        (TypeError, r"tops\[1\] is a float; it must be a whole number", {"tops": [1, 2.0]}),
        (TypeError, r"tops\[0\] is a bool; it must be a whole number", {"tops": [True, 2]}),
        (ValueError, r"tops\[1\] is 3; it must be from 1 to the number of channels, 2", {"tops": [3, 3]}),
        (ValueError, r"tops\[0\] is 0; it must be from 1", {"tops": [0, 1]}),
        (
            ValueError,
            r"tops\[0\] is 1; .* channels, 0",
            {**GOOD, "saliencies": [torch.zeros(2, 0)] * 2, "rankings": [THREE[:0]] * 2},
        ),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        ranking_loss(**{**GOOD, "tops": [1, 2], **changed})


def test_bad_rankings_are_found_whatever_serves():
    """By the kernel and by the reference, in both passes; nothing is read through them."""
    saliency, grad = torch.zeros(2, 3), torch.ones(())
    for ranking in (torch.tensor([0, 1, 2**40]), torch.tensor([0, -1, 1]), torch.tensor([2, 2, 0])):
        for name, (op, backward) in IMPLEMENTATIONS.items():
            error = RuntimeError if name == "kernel" and has_cpp else ValueError
            with pytest.raises(error, match=r"rankings\[1\]"):
                op([saliency] * 2, [torch.arange(3), ranking], [1, 1])
            with pytest.raises(error, match=r"rankings\[1\]"):
                backward(grad, [saliency] * 2, [torch.arange(3), ranking], [1, 1])


def test_check_ranking():
    for channels in (0, 1, 9):
        check_ranking(torch.randperm(channels), channels)
    for error, words, value in [
        (TypeError, r"T\[2\] is a list; it must be a tensor", [0, 1]),
        (TypeError, r"T\[2\] has dtype torch\.float32; it must be int64", torch.zeros(2)),
        (ValueError, r"T\[2\] has shape \(3,\); it must have one entry per channel, \(2,\)", torch.arange(3)),
        (ValueError, r"T\[2\] has 2 among its entries; it must be a permutation of 0 … 1", torch.tensor([1, 2])),
        (ValueError, r"T\[2\] has 0 several times; it must be a permutation of 0 … 1", torch.tensor([0, 0])),
    ]:
        with pytest.raises(error, match=words):
            check_ranking(value, 2, "T[2]")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    saliencies, rankings = map(list, zip(*[draw(3, channels, dtype) for channels in (4, 7)], strict=True))
    torch.library.opcheck(ranking_loss_op, (saliencies, rankings, [2, 7]))
    grad = torch.randn((), dtype=accumulator(dtype))
    torch.library.opcheck(
        ranking_loss_backward_op, (grad, [saliencies[0].t().contiguous().t(), saliencies[1]], rankings, [4, 1])
    )
    saliencies = [saliencies[0].t().contiguous().t().requires_grad_(), saliencies[1].requires_grad_()]
    torch.library.opcheck(ranking_loss_op, (saliencies, rankings, [2, 7]))


def test_gradcheck():
    for shapes, tops in [([(3, 4), (2, 6)], [2, 6]), ([(1, 1)], [1]), ([(2, 5), (0, 3)], [1, 2])]:
        saliencies, rankings = zip(*[draw(*shape, torch.float64) for shape in shapes], strict=True)
        saliencies = [saliency.requires_grad_() for saliency in saliencies]
        torch.autograd.gradcheck(lambda *s: ranking_loss(s, rankings, tops), saliencies)  # noqa: B023  called at once


def test_under_torch_compile():
    """One graph, with its gradients; eagerly, by the backend that runs what was traced as it is."""
    saliencies, rankings = map(list, zip(*[draw(3, channels) for channels in (4, 7)], strict=True))
    step = torch.compile(lambda s: ranking_loss(s, rankings, [2, 7]) * 2, backend="aot_eager", fullgraph=True)
    leaves = [saliency.clone().requires_grad_() for saliency in saliencies]
    phi = step(leaves)
    phi.backward()
    assert torch.equal(phi, 2 * ranking_loss(saliencies, rankings, [2, 7]))
    for leaf, ranking, top in zip(leaves, rankings, [2, 7], strict=True):
        check_gradient(leaf.grad, leaf.detach(), ranking, top, 2.0)


@needs_cpp
def test_same_bits_in_every_run_and_for_every_number_of_threads():
    threads = torch.get_num_threads()
    saliencies, rankings = zip(*[draw(70, channels) for channels in (*RESNET_56, 700)], strict=True)
    tops = [channels // 2 for channels in (*RESNET_56, 700)]
    grad, results = torch.randn(()), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            phi = ranking_loss_op(saliencies, rankings, tops)
            results.append((phi, *ranking_loss_backward_op(grad, saliencies, rankings, tops)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_a_second_gradient_is_refused():
    saliency = torch.randn(2, 3, requires_grad=True)
    phi = ranking_loss(saliency, torch.arange(3), 2)
    (grad,) = torch.autograd.grad(phi.square(), saliency, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_tolerance_of_half_gradients_is_that_of_their_dtype():
    """What is rounded is the gradient itself, once: half of a unit in the last place."""
    for dtype in (torch.float16, torch.bfloat16):
        saliency, ranking = draw(1, 30, dtype)
        (exact,) = ranking_loss_backward_op(torch.ones(()), [saliency.float()], [ranking], [12])
        (rounded,) = ranking_loss_backward_op(torch.ones(()), [saliency], [ranking], [12])
        assert torch.equal(rounded, exact.to(dtype))
        assert TOLERANCE[dtype]["rtol"] > torch.finfo(dtype).eps
