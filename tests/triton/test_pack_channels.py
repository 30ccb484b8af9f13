"""pack_channels: gathers and scatters of many tensors in one launch, bit for bit those of indexing."""

import pytest
import torch
from paamops.triton_kernels import pack_channels as kernels
from paamops.triton_kernels.pack_channels import launch_table, pack_channels, pack_channels_backward

from paamops.ops.pack_channels import packed_strides
from tests.triton import DEVICE


def kept(size, count):
    return torch.randperm(size)[:count].sort().values.to(DEVICE)


def gathered(tensor, axes, pool):
    for dim, slot in enumerate(axes):
        if slot >= 0:
            tensor = tensor.index_select(dim, pool[slot])
    return tensor


def scattered(grad, axes, pool, sizes):
    """Into zeros, by one indexed assignment."""
    result = torch.zeros(sizes, dtype=grad.dtype, device=grad.device)
    where = [
        torch.arange(size, device=DEVICE) if slot < 0 else pool[slot] for size, slot in zip(sizes, axes, strict=True)
    ]
    if where:
        result[torch.meshgrid(*where, indexing="ij")] = grad
        return result
    return grad.clone()


def check(tensors, axes, pool):
    slots = [slot for part in axes for slot in part]
    packed = pack_channels(tensors, pool, slots)
    assert len(packed) == len(tensors)
    for actual, tensor, part in zip(packed, tensors, axes, strict=True):
        wanted = gathered(tensor, part, pool)
        assert (actual.dtype, actual.shape) == (tensor.dtype, wanted.shape)
        assert torch.equal(actual, wanted)
        assert list(actual.stride()) == packed_strides(tensor.shape, tensor.stride(), wanted.shape)
        assert actual.untyped_storage().nbytes() == actual.numel() * actual.itemsize
        assert not actual.numel() or actual.data_ptr() != tensor.data_ptr()
    sizes = [size for tensor in tensors for size in tensor.shape]
    back = pack_channels_backward(packed, pool, slots, sizes)
    for actual, grad, part, tensor in zip(back, packed, axes, tensors, strict=True):
        assert torch.equal(actual, scattered(grad, part, pool, tensor.shape))
        assert actual.is_contiguous()
    return packed


def test_a_network_of_unequal_tensors():
    pool = [kept(8, 5), kept(16, 3), kept(8, 0), kept(40, 39)]
    tensors = [
        torch.randn(8, 16, 3, 3, device=DEVICE),
        torch.randn(16, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last),
        torch.randn(8, device=DEVICE),
        torch.tensor(7, device=DEVICE),
        torch.randn(16, 8, device=DEVICE).t(),
        torch.randn(2, 40, 4, 2, 3, device=DEVICE)[:, :, ::2],
        torch.randn(1, 40, device=DEVICE).expand(8, 40),
        torch.randn(0, 3, device=DEVICE),
        torch.randn(40, 90, 3, device=DEVICE),  # more than one block
        torch.randn(1, 1, 1, 1, device=DEVICE),
        torch.randn(8, 1, device=DEVICE).t(),
    ]
    axes = [
        (0, 1, -1, -1),
        (1, 0, -1, -1),
        (2,),
        (),
        (0, 1),
        (-1, 3, -1, -1, -1),
        (0, 3),
        (-1, -1),
        (3, -1, -1),
        (-1,) * 4,
        (-1, 0),
    ]
    packed = check(tensors, axes, pool)
    assert packed[1].is_contiguous(memory_format=torch.channels_last)
    assert packed[0].is_contiguous()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_any_dtype(dtype):
    tensor = torch.randn(7, 6, 5, dtype=torch.complex128, device=DEVICE)
    tensor = (tensor if dtype.is_complex else tensor.real * 3).to(dtype)
    check([tensor, tensor[0, 0, 0], tensor.transpose(0, 2)], [(0, 1, -1), (), (-1, 1, 0)], [kept(7, 4), kept(6, 3)])


def test_every_bit_of_a_nan_is_kept():
    bits = torch.tensor([0x7F800001, -1, 0x7FC00123, -2147483648], dtype=torch.int32, device=DEVICE)
    (packed,) = pack_channels([bits.view(torch.float32)], [torch.tensor([0, 2, 3], device=DEVICE)], [0])
    assert torch.equal(packed.view(torch.int32), bits[[0, 2, 3]])


def test_a_1x1_convolution_keeps_its_memory_format():
    weight = torch.randn(8, 16, 1, 1, device=DEVICE)
    pool = [kept(8, 4), kept(16, 8)]
    contiguous, last = check([weight, weight.to(memory_format=torch.channels_last)], [(0, 1, -1, -1)] * 2, pool)
    assert contiguous.stride() == (8, 1, 1, 1)
    assert last.stride() == (8, 1, 8, 8)


def test_gradients_of_any_strides():
    pool, sizes = [kept(6, 4)], [6, 5]
    grads = [
        torch.randn(5, 4, device=DEVICE).t(),
        torch.randn((), device=DEVICE).expand(4, 5),
        torch.randn(4, 11, device=DEVICE)[:, 1::2],
        torch.randn(21, device=DEVICE)[1:].view(4, 5),  # not aligned to 16 bytes
    ]
    for actual, grad in zip(pack_channels_backward(grads, pool, [0, -1] * 4, sizes * 4), grads, strict=True):
        assert torch.equal(actual, scattered(grad, (0, -1), pool, sizes))


def test_many_axes():
    tensor = torch.randn(2, 3, 2, 3, 2, 3, 2, device=DEVICE)
    check([tensor], [(0, 1, 0, 1, 0, 1, 0)], [kept(2, 1), kept(3, 2)])


def test_nothing():
    assert pack_channels([], [], []) == []
    assert pack_channels_backward([], [], [], []) == []


def test_numbers_that_need_64_bits(monkeypatch):
    """The wide kernel, which only tensors of 2^31 elements would need, on a small one."""
    monkeypatch.setattr(kernels, "launch_table", lambda *args: (*launch_table(*args)[:3], True))
    check([torch.randn(40, 90, device=DEVICE)], [(0, -1)], [kept(40, 20)])


def test_launch_table():
    small, large = torch.empty(2, 3, 9), torch.empty(4, 3, 9)
    walk = ((2, 27, 0), (27, 1, -1))
    members = [(small, large, walk), (torch.empty(3000), torch.empty(3000), ((3000, 1, -1),))]
    table, blocks, rank, wide = launch_table(members, [77])
    assert (rank, wide, blocks) == (2, False, [0, 1, 1, 1])
    assert table[:10] == [small.data_ptr(), large.data_ptr(), 54, 0, 27, 1, 0, 2, 27, 77]
    assert table[12:] == [3000, 1, 3000, 1, 0, 1, 0, 0]
    huge = torch.empty(2**31, device="meta")
    assert launch_table([(huge, huge, ((2**31, 1, -1),))], [])[3]
