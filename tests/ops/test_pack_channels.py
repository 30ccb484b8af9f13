"""pack_channels against indexing by numpy's ix_, one tensor at a time."""

import numpy as np
import pytest
import torch

from paamops.ops import pack_channels as module
from paamops.ops.pack_channels import pack_channels

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("paamops::pack_channels", "CPU")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The bits as integers that numpy knows: what is packed is the bits, whatever they mean."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.resolve_neg().view(BITS[tensor.dtype.itemsize])


def brute_force(tensor, axes):
    kept = [np.arange(size) if axis is None else axis.numpy() for size, axis in zip(tensor.shape, axes, strict=True)]
    values = bits(tensor).numpy()
    return torch.from_numpy(values[np.ix_(*kept)] if kept else values.copy())


def random_indices(size):
    """Everything that a vector of kept indices may be: random, none, one, all, or a few runs."""
    kind = int(torch.randint(0, 6, ()))
    if kind == 0 or size == 0:
        return torch.arange(0)
    if kind == 1:
        return torch.randint(0, size, (1,))
    if kind == 2:
        return torch.arange(size)
    if kind == 3:
        return (torch.arange(size) // max(size // 4, 1) % 2 == 0).nonzero().flatten()
    return torch.randperm(size)[: (size + 1) // 2].sort().values


def random_axes(shape):
    return [None if torch.rand(()) < 0.3 else random_indices(size) for size in shape]


def random_tensor(shape, dtype):
    """Random bits; as large as they come, since nothing but copying may happen to them."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, shape, dtype=dtype)


def check(tensors, indices):
    packed = pack_channels(tensors, indices)
    assert len(packed) == len(tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    for tensor, axes, result in zip(tensors, indices, packed, strict=True):
        expected = brute_force(tensor, axes)
        assert result.dtype == tensor.dtype
        assert torch.equal(bits(result), expected)
        assert list(result.stride()) == module.packed_strides(tensor.shape, tensor.stride(), result.shape)
        if result.numel():
            span = sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
            assert span < result.numel()
            assert result.untyped_storage().data_ptr() not in storages
            storages.add(result.untyped_storage().data_ptr())
    return packed


def layouts(dtype, shape):
    """The same shape in every layout: contiguous, transposed, sliced with gaps, expanded, offset."""
    dims = len(shape)
    yield random_tensor(shape, dtype)
    order = torch.randperm(dims).tolist()
    yield random_tensor([shape[dim] for dim in order], dtype).permute([order.index(dim) for dim in range(dims)])
    wide = random_tensor([2 * size + 1 for size in shape], dtype)
    yield wide[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    yield wide[tuple(slice(1, size + 1) for size in shape)]
    yield random_tensor([1 if dim % 2 else size for dim, size in enumerate(shape)], dtype).expand(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(), (1,), (37,), (0,), (8, 5), (50, 41), (6, 1, 7), (7, 6, 3, 3), (4, 3, 0, 2), (3, 4, 2, 3, 2)]
)
def test_equals_indexing(dtype, shape):
    tensors = [tensor for _ in range(3) for tensor in layouts(dtype, shape)]
    check(tensors, [random_axes(shape) for _ in tensors])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64, torch.complex128])
def test_many_tensors_of_many_sizes(dtype):
    """Wide enough for jobs that split rows, units and runs; an axis of 70,000 has more than one job in a row."""
    shapes = [
        (70_000,),
        (3, 30_000),
        (200, 150),
        (30_000, 3),
        (65, 64, 3, 3),
        (33, 20, 5, 5),
        (9, 7, 7, 7),
        (),
        (300_000,),
    ]
    tensors = [random_tensor(shape, dtype) for shape in shapes for _ in range(2)]
    half = [[torch.randperm(n)[: n // 2].sort().values for n in tensor.shape] for tensor in tensors[::2]]
    check(
        tensors,
        [axes for pair in zip(half, (random_axes(t.shape) for t in tensors[1::2]), strict=True) for axes in pair],
    )
    check(tensors, [[None] * tensor.dim() for tensor in tensors])
    check(tensors, [[torch.arange(n) for n in tensor.shape] for tensor in tensors])
    check(tensors, [[torch.arange(1, n, 2) for n in tensor.shape] for tensor in tensors])
    check(tensors, [[torch.arange(0, n, 19) for n in tensor.shape] for tensor in tensors])


@pytest.mark.parametrize("filter_size", [1, 2, 3, 5, 7, 23])
def test_filters_of_every_size(filter_size):
    for dtype in (torch.int8, torch.float16, torch.float32, torch.float64):
        tensor = random_tensor((20, 17, filter_size, filter_size), dtype)
        check([tensor, tensor], [random_axes(tensor.shape), [random_indices(20), random_indices(17), None, None]])


def test_memory_format_is_kept():
    kept_out, kept_in = torch.arange(0, 12, 2), torch.tensor([0, 3, 4])
    for shape in ((12, 8, 3, 3), (12, 8, 1, 1), (12, 8, 1, 3), (12, 1, 3, 3)):
        axes = [kept_out, kept_in if shape[1] > 1 else None, None, None]
        tensor = torch.randn(shape)
        (packed,) = check([tensor], [axes])
        assert packed.is_contiguous()
        (packed,) = check([tensor.to(memory_format=torch.channels_last)], [axes])
        assert packed.is_contiguous(memory_format=torch.channels_last)
        assert packed.stride()[1] == 1
    volume = torch.randn(12, 8, 2, 3, 3).to(memory_format=torch.channels_last_3d)
    (packed,) = check([volume], [[kept_out, kept_in, None, None, None]])
    assert packed.is_contiguous(memory_format=torch.channels_last_3d)
    (packed,) = check([torch.randn(8, 12).t()], [[kept_out, kept_in]])
    assert packed.t().is_contiguous()


def test_conjugate_and_negative_views():
    tensor = torch.randn(9, 8, dtype=torch.complex64)
    rows = torch.tensor([1, 2, 8])
    (packed,) = pack_channels([tensor.conj()], [[rows, None]])
    assert torch.equal(packed, tensor[rows].conj())
    (packed,) = pack_channels([tensor.conj().imag], [[rows, None]])
    assert torch.equal(packed, -tensor.imag[rows])


def test_one_vector_serves_many_axes():
    kept = torch.tensor([0, 2])
    pool, slots = module._pool([torch.ones(3, 3), torch.ones(3)], [[kept, kept], [kept.clone()]])
    assert slots == [0, 0, 1]
    assert len(pool) == 2
    check([torch.randn(3, 3), torch.randn(3)], [[kept, kept], [kept]])


def test_strided_index_vectors():
    check([torch.randn(40)], [[torch.arange(40)[::3]]])
    check([torch.randn(40)], [[torch.arange(80).view(40, 2)[:20, 1]]])


def test_nothing():
    assert pack_channels([], []) == []


def malformed():
    tensor = torch.randn(4, 3)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1])
    yield ValueError, "indices must have one entry per tensor, 1, got 2", [tensor], [[rows, columns], [None]]
    yield ValueError, r"indices\[0\] must have one entry per dimension of tensors\[0\], 2, got 1", [tensor], [[rows]]
    yield TypeError, r"tensors\[1\] must be a tensor, got float", [tensor, 1.0], [[None, None], []]
    yield (
        TypeError,
        r"indices\[0\]\[1\] must be an int64 tensor or None, got torch.int32",
        [tensor],
        [[rows, rows.int()]],
    )
    yield TypeError, r"indices\[0\]\[0\] must be an int64 tensor or None, got list", [tensor], [[[0, 1], None]]
    yield ValueError, r"indices\[0\]\[0\] must have the shape \(kept,\)", [tensor], [[rows.view(1, 2), None]]
    yield ValueError, r"tensors\[1\] is on meta", [tensor, tensor.to("meta")], [[None, None]] * 2
    for bad, text in (
        ([0, 4], r"within 0\.\.3, the axis of tensors\[1\], but reaches from 0 to 4"),
        ([-1, 2], r"within 0\.\.3, the axis of tensors\[1\], but reaches from -1 to 2"),
        ([1 << 40], r"within 0\.\.3"),
        ([2, 1], "strictly increasing, but has 2 before 1"),
        ([0, 1, 1], "strictly increasing, but has 1 before 1"),
        ([0, 1 << 40, 1], "strictly increasing"),
    ):
        indices = [[rows, columns], [torch.tensor(bad), columns]]
        yield ValueError, r"indices\[1\]\[0\] must be " + text, [tensor, tensor], indices


@pytest.mark.parametrize(("error", "match", "tensors", "indices"), list(malformed()))
def test_malformed(error, match, tensors, indices):
    with pytest.raises(error, match=match):
        pack_channels(tensors, indices)


@pytest.mark.skipif(not HAS_KERNEL, reason="the reference leaves these checks to the wrapper")
@pytest.mark.parametrize(
    ("vectors", "slots"),
    [
        ([[0, 4]], [0, -1]),
        ([[-1, 2]], [0, -1]),
        ([[0, 3]], [-1, 0]),
        ([[2, 1]], [0, -1]),
        ([[0, 0]], [0, -1]),
        ([[0, 1 << 60, 1]], [0, -1]),
        ([[0]], [0, 1]),
        ([[0]], [0, -2]),
        ([[0]], [0]),
        ([[0]], [0, -1, -1]),
    ],
)
def test_the_kernel_reads_nothing_out_of_bounds(vectors, slots):
    """Whoever calls the op without the wrapper gets an error too."""
    pool = [torch.tensor(vector) for vector in vectors]
    tensor = torch.randn(4, 3)
    with pytest.raises((RuntimeError, ValueError), match="must"):
        torch.ops.paamops.pack_channels([tensor], pool, slots)
    with pytest.raises((RuntimeError, ValueError), match="must"):
        torch.ops.paamops.pack_channels_backward([torch.randn(2, 3)], pool, slots, [4, 3])


@pytest.mark.skipif(not HAS_KERNEL, reason="the reference leaves these checks to the wrapper")
def test_the_kernel_refuses_wrong_vectors_and_sizes():
    tensor, kept = torch.randn(4, 3), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="1-D int64"):
        torch.ops.paamops.pack_channels([tensor], [kept.int()], [0, -1])
    with pytest.raises(RuntimeError, match="1-D int64"):
        torch.ops.paamops.pack_channels([tensor], [kept.view(1, 2)], [0, -1])
    for sizes in ([4, 2], [1, 3], [4], [4, 3, 1], [-4, 3]):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.paamops.pack_channels_backward([tensor[:2]], [kept], [0, -1], sizes)
    with pytest.raises(RuntimeError, match="sizes of what was packed"):
        torch.ops.paamops.pack_channels_backward([tensor], [kept], [0, -1], [4, 3])


def test_same_for_any_number_of_threads():
    tensors = [torch.randn(256, 128, 3, 3), torch.randn(512, 512, 1, 1), torch.randn(1 << 20), torch.randn(())]
    indices = [random_axes(tensor.shape) for tensor in tensors]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(pack_channels(tensors, indices))
    finally:
        torch.set_num_threads(threads)
    for packed in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], packed, strict=True))


def samples(**kwargs):
    tensors = [
        torch.randn(5, 4, 2, 2, **kwargs).to(memory_format=torch.channels_last).detach(),
        torch.randn(5, **kwargs),
    ]
    tensors += [torch.randn((), **kwargs), torch.randn(6, 5, **kwargs).t().detach()]
    for tensor in tensors:
        tensor.requires_grad_()
    pool = [torch.tensor([0, 2, 3]), torch.tensor([1]), torch.arange(0)]
    return tensors, pool, [0, 1, -1, -1, 0, 0, 1]


def test_kernel_equals_reference():
    tensors, pool, slots = samples()
    sizes = [size for tensor in tensors for size in tensor.shape]
    packed = torch.ops.paamops.pack_channels(tensors, pool, slots)
    for result, reference in zip(packed, module._reference(tensors, pool, slots), strict=True):
        assert torch.equal(result, reference)
        assert result.stride() == reference.stride()
    grads = [torch.randn_like(result) for result in packed]
    scattered = torch.ops.paamops.pack_channels_backward(grads, pool, slots, sizes)
    for result, reference in zip(scattered, module._backward_reference(grads, pool, slots, sizes), strict=True):
        assert torch.equal(result, reference)
        assert result.stride() == reference.stride()


def test_opcheck():
    tensors, pool, slots = samples()
    torch.library.opcheck(torch.ops.paamops.pack_channels.default, (tensors, pool, slots))
    torch.library.opcheck(torch.ops.paamops.pack_channels.default, (tensors[:1], pool, [2, -1, -1, 2][:4]))
    mixed = [*tensors, torch.tensor(3), torch.ones(5, dtype=torch.bool)]
    torch.library.opcheck(torch.ops.paamops.pack_channels.default, (mixed, pool, [*slots, 0]))
    grads = [torch.randn(3, 1, 2, 2, requires_grad=True), torch.randn(3, requires_grad=True)]
    torch.library.opcheck(
        torch.ops.paamops.pack_channels_backward.default, (grads, pool, [0, 1, -1, -1, 0], [5, 4, 2, 2, 5])
    )


def test_gradcheck():
    tensors, pool, slots = samples(dtype=torch.float64)

    def packed(*tensors):
        return tuple(torch.ops.paamops.pack_channels(list(tensors), pool, slots))

    assert torch.autograd.gradcheck(packed, tensors)
    assert torch.autograd.gradgradcheck(packed, tensors)


def test_gradients_of_indexing():
    """Against autograd's own, with integer tensors in between and a result that nobody uses."""
    weight, bias, unused = torch.randn(40, 30, 3, 3), torch.randn(40), torch.randn(40)
    steps = torch.tensor(7)
    rows, columns = torch.randperm(40)[:20].sort().values, torch.randperm(30)[:15].sort().values
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, bias, unused)]
    packed = pack_channels([leaves[0], steps, leaves[1], leaves[2]], [[rows, columns, None, None], [], [rows], [rows]])
    assert not packed[1].requires_grad
    factor = torch.randn(15, 20, 3, 3).transpose(0, 1)  # the gradient comes in strides of its own
    ((packed[0] * factor).sum() + packed[2].square().sum()).backward()
    expected = [tensor.clone().requires_grad_() for tensor in (weight, bias)]
    ((expected[0][rows][:, columns] * factor).sum() + expected[1][rows].square().sum()).backward()
    assert torch.equal(leaves[0].grad, expected[0].grad)
    assert torch.equal(leaves[1].grad, expected[1].grad)
    assert leaves[2].grad is None


def test_large_gradients():
    """Rows and runs that are split into several jobs, scattered."""
    for shape in ((300_000,), (3, 60_000), (300, 200), (70, 60, 3, 3)):
        tensor = torch.randn(shape, dtype=torch.float64)
        for _ in range(3):
            axes = [random_indices(size) if len(shape) < 4 or dim < 2 else None for dim, size in enumerate(shape)]
            leaf = tensor.clone().requires_grad_()
            (packed,) = pack_channels([leaf], [axes])
            grad = torch.randn_like(packed)
            packed.backward(grad)
            expected = torch.zeros(shape, dtype=torch.float64)
            full = [torch.arange(n) if axis is None else axis for n, axis in zip(shape, axes, strict=True)]
            expected[torch.meshgrid(*full, indexing="ij")] = grad
            assert torch.equal(leaf.grad, expected)


def test_indices_are_checked_before_a_kernel_that_does_not(monkeypatch):
    """As on a GPU, and where C++ is not built: right ones pass, beside axes that stay whole, and wrong ones do not."""
    monkeypatch.setattr("paamops.ops.pack_channels.compiled", None)
    x, y = torch.randn(4, 6, 3), torch.randn(6)
    some, few = torch.tensor([1, 2, 5]), torch.tensor([0, 3])
    packed = pack_channels([x, y], [(few, some, None), (some,)])
    assert torch.equal(packed[0], x[few][:, some])
    assert torch.equal(packed[1], y[some])
    with pytest.raises(ValueError, match=r"indices\[0\]\[1\] must be strictly increasing, but has 5 before 2"):
        pack_channels([x, y], [(None, torch.tensor([1, 5, 2]), None), (None,)])
    with pytest.raises(ValueError, match=r"indices\[1\]\[0\] must be within 0\.\.5"):
        pack_channels([x, y], [(None, None, None), (torch.tensor([2, 6]),)])
