"""The votes of many images for the ranks of their channels on a GPU: one launch, no sort, nothing kept in between.

The rank of a channel is the number of channels before it, so it is counted: N · C² comparisons of integers that order
like the saliencies, a block of channels against all of an image, which comes from a cache. Then every channel adds one
vote: only integers are added by atomics, so the order in which they arrive does not matter.
"""

import torch
import triton
import triton.language as tl

from .device import on

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F80 << 16, torch.float64: 0x7FF0 << 48}
BLOCK = 32  # channels of a program, at most: more of them take more registers
STEP = 64  # channels that it compares them with at a time, at most
SPOILT = 1 << 32  # the same as in paamops.ops.vote_ranking; a test compares them
NUM_WARPS = 4


def vote_ranking(saliency, votes):
    """votes[j, r] += how many images place channel j at rank r; an image with NaN takes SPOILT off votes[0, 0]."""
    images, channels = saliency.shape
    if images == 0:
        return
    widest = triton.next_power_of_2(channels)
    block = min(BLOCK, widest)
    blocks = triton.cdiv(channels, block)
    # Only the bits are looked at: that spares every question of rounding and of denormal numbers.
    bits = saliency.view(WORDS[saliency.itemsize])
    with on(saliency):
        _vote[(images * blocks,)](
            bits,
            votes,
            channels,
            blocks,
            *bits.stride(),
            INFINITY=INFINITY[saliency.dtype],
            BITS=8 * saliency.itemsize,
            SPOILT=SPOILT,
            BLOCK=block,
            STEP=min(STEP, widest),
            num_warps=NUM_WARPS,
        )


@triton.jit
def _keys(row, channel, channels, s_channel, BITS: tl.constexpr):
    """Integers that order like the saliencies, the same for 0.0 and -0.0; beyond the last channel the least of all."""
    wide: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    mask = channel < channels
    bits = tl.load(row + channel.to(tl.int64) * s_channel, mask=mask, other=0).to(wide)
    key = bits ^ ((bits >> (BITS - 1)) & ((1 << (BITS - 1)) - 1))  # magnitudes are turned where the sign is set
    key = tl.where(key == -1, 0, key)
    return tl.where(mask, key, -(1 << (BITS - 1)))


@triton.jit
def _vote(
    saliency,
    votes,
    channels,
    blocks,
    s_image,
    s_channel,
    INFINITY: tl.constexpr,
    BITS: tl.constexpr,
    SPOILT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The votes of one image for one block of channels."""
    program = tl.program_id(0)
    row = saliency + (program // blocks).to(tl.int64) * s_image
    first = (program % blocks) * BLOCK
    channel = first + tl.arange(0, BLOCK)
    key = _keys(row, channel, channels, s_channel, BITS)
    before = tl.zeros((BLOCK, STEP), tl.int32)
    spoilt = tl.zeros((STEP,), tl.int32)
    for start in range(0, channels, STEP):
        other = start + tl.arange(0, STEP)
        other_key = _keys(row, other, channels, s_channel, BITS)
        # NaN is beyond both infinities; what lies outside is not.
        nan = (other_key > INFINITY) | (other_key < -INFINITY - 1)
        spoilt = spoilt | (nan & (other < channels)).to(tl.int32)
        # Among equals the lower index comes before: its key counts as greater by one. No key but NaN is so large that
        # one more would overflow.
        lower = (other[None, :] < channel[:, None]).to(key.dtype)
        before += (other_key[None, :] + lower > key[:, None]).to(tl.int32)
    rank = tl.sum(before, 1)
    valid = tl.max(spoilt, 0) == 0
    if valid:
        tl.atomic_add(votes + channel.to(tl.int64) * channels + rank, 1, mask=channel < channels, sem="relaxed")
    elif first == 0:
        tl.atomic_add(votes, -SPOILT, sem="relaxed")
