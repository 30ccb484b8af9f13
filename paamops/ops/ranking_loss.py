"""How far the saliencies of images are from one ranking of the channels: GlobalPru's learn-to-rank loss, all layers.

    Φ = Σ_l (1 / N_l) Σ_n Σ_{j < top_l} [log Σ_{m ≥ j} exp y_m - y_j]        y_m = saliency_l[n, ranking_l[m]]

With LSE_j = log Σ_{m ≥ j} exp y_m its gradient is
    ∂y_m = (Σ_{j ≤ min(m, top - 1)} exp(y_m - LSE_j) - [m < top]) / N        every exponential ≤ 1, since y_m ≤ LSE_j

In that form both need time in proportion to C, by sums that run over the ranks, and LSE loses what is small beside the
saliencies. The kernels keep LSE_j as a pair (R_j, S_j), LSE_j = R_j + log S_j, where R_j is the greatest y_m with m ≥ j
(on the CPU at most 1 below it). So they only ever exponentiate differences of saliencies, none above 1:
    the terms of the loss are (R_j - y_j) + log S_j
    the sums of the gradient are exp(y_m - R_m) P_m, with P_m = P_{m-1} exp(R_m - R_{m-1}) + [m < top] / S_m
They neither overflow nor lose anything at any scale: R does not rise with the rank, so that no factor of P exceeds 1.
"""

import numbers

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ranking_loss(saliencies, rankings, tops):
    """Φ = Σ_l (1 / N_l) Σ_n Σ_{j < top_l} [log Σ_{m ≥ j} exp y_m - y_j], with y_m = saliency_l[n, ranking_l[m]].

    saliencies: list of L tensors (N_l, C_l), float16 to float64, one dtype on one device, any strides; the larger, the
    more important. rankings: list of L tensors (C_l,), int64, on that device, each a permutation of its channels, the
    most important first. tops: list of L whole numbers from 1 to C_l. One layer's three may be given without lists.
    Returns a 0-d tensor, float32 (float64 for float64 saliencies), computed in that dtype. A layer without images adds
    0. Differentiable once, in the saliencies: contiguous gradients (N_l, C_l) in their dtype.
    A NaN makes the loss NaN, and the gradients of its image in its layer. -inf is a channel that never wins: fine below
    the top, an infinite loss within it. +inf makes the loss infinite or NaN.
    TypeError: an argument is no tensor, list or whole number of the kind above. ValueError: a shape, a length, a device
    or a top is wrong, or a ranking is no permutation. The last is found on the CPU only, since the host would have to
    wait for a GPU. There entries are clamped to the channels: nothing outside the tensors is read or written, and what
    a bad ranking yields is meaningless. `check_ranking` looks at a ranking once, wherever it is.
    Source: GlobalPru (Wang et al. 2023), §3.3, eq. 8. As printed, its inner sum runs over the top channels only,
    whatever the term, which is invariant to their order. That it starts at j is our reading (ListMLE over the top
    places), and that it runs to the last channel, so that kept channels compete with removed ones. The mean over the
    images of a batch is our choice, too. `ranking_loss_reference(…, literal=True)` is the printed form.
    """
    if isinstance(saliencies, torch.Tensor):
        saliencies, rankings, tops = [saliencies], [rankings], [tops]
    _check(saliencies, rankings, tops)
    saliencies, rankings = list(saliencies), list(rankings)
    try:
        return ranking_loss_op(saliencies, rankings, [int(top) for top in tops])
    except RuntimeError:  # the C++ kernel checks the permutations itself, which is free, but raises no ValueError
        _check_permutations(rankings)
        raise


def check_ranking(ranking, channels, name="ranking"):
    """Raise the error that says why `ranking` is no permutation of 0 … channels - 1; the host waits for a GPU."""
    if not isinstance(ranking, torch.Tensor):
        raise TypeError(f"{name} is a {type(ranking).__name__}; it must be a tensor")
    if ranking.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {ranking.dtype}; it must be int64")
    if ranking.shape != (channels,):
        raise ValueError(f"{name} has shape {tuple(ranking.shape)}; it must have one entry per channel, ({channels},)")
    entries = ranking.cpu()
    wrong = entries[(entries < 0) | (entries >= channels)]
    if not len(wrong):
        wrong = (entries.bincount(minlength=channels) > 1).nonzero().flatten()
        what = "several times"
    else:
        what = "among its entries"
    if len(wrong):
        raise ValueError(f"{name} has {int(wrong[0])} {what}; it must be a permutation of 0 … {channels - 1}")


def _check(saliencies, rankings, tops):
    """Raise the error that names the argument, what it was and what it must be; values are not looked at."""
    for name, value in (("saliencies", saliencies), ("rankings", rankings), ("tops", tops)):
        if not isinstance(value, (list, tuple)):
            kind = "whole numbers" if name == "tops" else "tensors"
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of {kind}, one for each layer")
    if not saliencies:
        raise ValueError("saliencies is empty; it must have at least one layer")
    for name, value in (("rankings", rankings), ("tops", tops)):
        if len(value) != len(saliencies):
            raise ValueError(f"{name} has {len(value)} entries; it must have one for each layer, {len(saliencies)}")
    first = saliencies[0]
    for layer, (saliency, ranking, top) in enumerate(zip(saliencies, rankings, tops, strict=True)):
        for name, value in (("saliencies", saliency), ("rankings", ranking)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}[{layer}] is a {type(value).__name__}; it must be a tensor")
        if saliency.dtype not in DTYPES:
            raise TypeError(
                f"saliencies[{layer}] has dtype {saliency.dtype}; it must be float16, bfloat16, float32 or float64"
            )
        if saliency.dtype != first.dtype:
            raise TypeError(
                f"saliencies[{layer}] has dtype {saliency.dtype}; it must be that of the first, {first.dtype}"
            )
        if saliency.ndim != 2:
            raise ValueError(
                f"saliencies[{layer}] has shape {tuple(saliency.shape)}; it must have two dimensions, (N, C)"
            )
        if ranking.dtype != torch.int64:
            raise TypeError(f"rankings[{layer}] has dtype {ranking.dtype}; it must be int64")
        if ranking.shape != saliency.shape[1:]:
            raise ValueError(
                f"rankings[{layer}] has shape {tuple(ranking.shape)}; it must have one entry per channel of "
                f"saliencies[{layer}], ({saliency.shape[1]},)"
            )
        for name, value in (("saliencies", saliency), ("rankings", ranking)):
            if value.device != first.device:
                raise ValueError(f"{name}[{layer}] is on {value.device}; it must be on {first.device}, as the first is")
        if isinstance(top, bool) or not isinstance(top, numbers.Integral):
            raise TypeError(f"tops[{layer}] is a {type(top).__name__}; it must be a whole number")
        if not 1 <= top <= saliency.shape[1]:
            raise ValueError(
                f"tops[{layer}] is {top}; it must be from 1 to the number of channels, {saliency.shape[1]}"
            )


def _check_permutations(rankings):
    for layer, ranking in enumerate(rankings):
        if ranking.device.type == "cpu":
            check_ranking(ranking, len(ranking), f"rankings[{layer}]")


def ranking_loss_reference(saliencies, rankings, tops, literal=False):
    """Φ: 0-d, float32 (float64 for float64 saliencies).

    Computed in float64 whatever the dtype: in float32 a log-sum-exp of saliencies in the thousands is off by a
    thousandth, and the gradient with it. literal: eq. 8 as printed, Σ_{j < top} [log Σ_{m < top} exp y_m - y_j].
    """
    _check_permutations(rankings)
    total = saliencies[0].new_zeros((), dtype=torch.float64)
    for saliency, ranking, top in zip(saliencies, rankings, tops, strict=True):
        if not len(saliency):
            continue
        ranked = saliency.double()[:, ranking]
        sums = ranked[:, :top].logsumexp(1, keepdim=True) if literal else _suffix_sums(ranked)[:, :top]
        total = total + (sums - ranked[:, :top]).sum(1).mean()
    return total.to(_accumulator(saliencies[0]))


def ranking_loss_backward_reference(grad, saliencies, rankings, tops):
    """∂saliencies: contiguous, (N_l, C_l) each in their dtype, computed in float64."""
    _check_permutations(rankings)
    grads = []
    for saliency, ranking, top in zip(saliencies, rankings, tops, strict=True):
        ranked = saliency.double()[:, ranking]
        before = (-_suffix_sums(ranked)[:, :top]).logcumsumexp(1)  # log Σ_{j ≤ m} exp(-LSE_j)
        rest = before[:, -1:].expand(-1, ranked.shape[1] - top)
        gradient = (ranked + torch.cat((before, rest), 1)).exp()
        gradient[:, :top] -= 1
        gradient *= grad / max(1, len(saliency))
        grads.append(torch.empty_like(gradient).index_copy_(1, ranking, gradient).to(saliency.dtype))
    return grads


def _suffix_sums(ranked):
    """LSE_j = log Σ_{m ≥ j} exp y_m."""
    return ranked.flip(1).logcumsumexp(1).flip(1)


def _accumulator(saliency):
    return torch.float64 if saliency.dtype == torch.float64 else torch.float32


def _save(ctx, inputs, output):
    saliencies, rankings, ctx.tops = inputs
    ctx.save_for_backward(*saliencies, *rankings)


def _backward(ctx, grad):
    layers = len(ctx.tops)
    saved = ctx.saved_tensors
    grads = ranking_loss_backward_op(grad, list(saved[:layers]), list(saved[layers:]), ctx.tops)
    return grads, [None] * layers, None


ranking_loss_backward_op = define(
    "ranking_loss_backward(Tensor grad, Tensor[] saliencies, Tensor[] rankings, int[] tops) -> Tensor[]",
    reference=ranking_loss_backward_reference,
    fake=lambda grad, saliencies, rankings, tops: [saliency.new_empty(saliency.shape) for saliency in saliencies],
)

ranking_loss_op = define(
    "ranking_loss(Tensor[] saliencies, Tensor[] rankings, int[] tops) -> Tensor",
    reference=ranking_loss_reference,
    fake=lambda saliencies, rankings, tops: saliencies[0].new_empty((), dtype=_accumulator(saliencies[0])),
    setup_context=_save,
    backward=_backward,
)
