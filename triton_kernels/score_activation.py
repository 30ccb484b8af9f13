"""Kernels shared by `leaky_exponential` and `tempered_sigmoid`: scores and their sum, and the gradient of both.

An element costs one read and one write, and two more reads backward: some ten thousand scores are bound by the launch.
The sum is taken per block of BLOCK scores, then over the blocks in their order. Launches: 1 up to BLOCK scores, else 2;
backward 1.
"""

import torch
import triton
import triton.language as tl

from .device import on, registers

BLOCK = 1024
NUM_WARPS = 4
SLOTS = 1024  # sums of blocks that are added up at a time


def forward(x, parameter, kind):
    """score like x; l1: 0-d, the sum of the scores in the accumulator dtype, before they are rounded to x's."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    score, count = torch.empty_like(x), x.numel()
    if count == 0:
        return score, x.new_zeros((), dtype=accumulator)
    total = x.new_empty((), dtype=accumulator)
    blocks = triton.cdiv(count, BLOCK)
    sums = total if blocks == 1 else total.new_empty(blocks)
    with on(x):
        _activate[(blocks,)](_in_order(x, score), score, sums, count, *_constants(x, parameter), KIND=kind, **_sizes())
        if blocks > 1:
            _add_sums[(1,)](sums, total, blocks, SLOTS=SLOTS, num_warps=NUM_WARPS)
    return score, total


def backward(grad_score, grad_l1, x, parameter, kind):
    """Gradient like x: (∂score + ∂l1) score'(x), since no score is negative."""
    out, count = torch.empty_like(x), x.numel()
    if count:
        tensors = _in_order(grad_score, out), grad_l1, _in_order(x, out), out
        with on(x):
            _activation_gradient[(triton.cdiv(count, BLOCK),)](
                *tensors, count, *_constants(x, parameter), KIND=kind, **_sizes()
            )
    return out


def _sizes():
    return {"BLOCK": BLOCK, "num_warps": NUM_WARPS, **registers(_activate)}


def _in_order(tensor, like):
    """The tensor, its elements in the order of the memory of `like`, which is dense."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _constants(x, parameter):
    """The parameter as an argument, which Triton makes a float32; for float64 as a constant of the kernel."""
    return (0.0, parameter) if x.dtype == torch.float64 else (parameter, None)


@triton.jit
def _score(x, parameter, KIND: tl.constexpr):
    if KIND == "leaky_exponential":
        return tl.where(x > 0, 1 + parameter * x, tl.exp(tl.where(x > 0, 0.0, x)))  # NaN stays
    else:
        return 1 / (1 + tl.exp(-(x / parameter)))


@triton.jit
def _slope(x, parameter, KIND: tl.constexpr):
    if KIND == "leaky_exponential":
        return tl.where(x > 0, parameter, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        e = tl.exp(-tl.abs(x / parameter))  # score (1 - score), where nothing cancels
        r = 1 / (1 + e)
        return e * r * r / parameter


@triton.jit
def _parameter(value, CONSTANT: tl.constexpr, like):
    return tl.full((), value if CONSTANT is None else CONSTANT, like)


@triton.jit
def _activate(
    x,
    score,
    sums,
    count,
    parameter,
    CONSTANT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores of one block, and their sum. Whole blocks go without a mask, which would narrow the accesses."""
    program = tl.program_id(0)
    acc: tl.constexpr = sums.dtype.element_ty
    parameter = _parameter(parameter, CONSTANT, acc)
    begin = program.to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= count:
        value = _score(tl.load(x + element).to(acc), parameter, KIND)
        tl.store(score + element, value.to(score.dtype.element_ty))
        tl.store(sums + program, tl.sum(value, 0))
    else:
        mask = element < count
        value = _score(tl.load(x + element, mask=mask, other=0).to(acc), parameter, KIND)
        tl.store(score + element, value.to(score.dtype.element_ty), mask=mask)
        tl.store(sums + program, tl.sum(tl.where(mask, value, 0), 0))


@triton.jit
def _add_sums(sums, total, blocks, SLOTS: tl.constexpr):
    value = tl.zeros((SLOTS,), sums.dtype.element_ty)
    for start in range(0, blocks, SLOTS):
        block = start + tl.arange(0, SLOTS)
        value += tl.load(sums + block, mask=block < blocks, other=0)
    tl.store(total, tl.sum(value, 0))


@triton.jit
def _activation_gradient(
    grad_score,
    grad_l1,
    x,
    grad_x,
    count,
    parameter,
    CONSTANT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x of one block."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    of_sum = tl.load(grad_l1)
    acc: tl.constexpr = grad_l1.dtype.element_ty
    parameter = _parameter(parameter, CONSTANT, acc)
    if begin + BLOCK <= count:
        gradient = tl.load(grad_score + element).to(acc) + of_sum
        gradient *= _slope(tl.load(x + element).to(acc), parameter, KIND)
        tl.store(grad_x + element, gradient.to(grad_x.dtype.element_ty))
    else:
        mask = element < count
        gradient = tl.load(grad_score + element, mask=mask, other=0).to(acc) + of_sum
        gradient *= _slope(tl.load(x + element, mask=mask, other=0).to(acc), parameter, KIND)
        tl.store(grad_x + element, gradient.to(grad_x.dtype.element_ty), mask=mask)
