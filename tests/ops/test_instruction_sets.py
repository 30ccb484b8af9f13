"""The C++ kernels with the vector instructions of lesser machines: each must agree with the reference."""

import pytest
import torch

from paamops.ops import activation_attention as attention
from paamops.ops import pack_channels as packing
from paamops.ops import relu_attention as relu
from paamops.ops.registration import compiled
from tests.tolerances import accumulator, assert_close

SETS = range(2, compiled.build_facts()["instruction_set"] + 1) if compiled else ()


@pytest.fixture(params=SETS)
def instruction_set(request):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(request.param)
    yield request.param
    compiled.use_instruction_set(best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention(instruction_set, dtype, p, memory_format):
    x = torch.randn(3, 37, 19, 21).to(dtype).contiguous(memory_format=memory_format)
    wide = x.double().abs().pow(p).flatten(2)
    total, peak = attention.activation_attention_op(x, p)
    assert_close(total, wide.sum(2), accumulator(dtype))
    assert_close(peak, wide.amax(2), accumulator(dtype))
    y, total, peak = relu.relu_attention_op(x, p)
    assert torch.equal(y, x.relu())
    wide = x.double().relu().pow(p).flatten(2)
    assert_close(total, wide.sum(2), accumulator(dtype))
    assert_close(peak, wide.amax(2), accumulator(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.float64])
def test_packing(instruction_set, dtype):
    tensors = [torch.randn(s).mul(50).to(dtype) for s in ((70, 130), (40, 60, 3, 3), (200,), (9, 50, 1, 1))]
    axes = [[torch.randperm(n)[: n // 2 + 1].sort().values for n in t.shape] for t in tensors]
    for packed, tensor, kept in zip(packing.pack_channels(tensors, axes), tensors, axes, strict=True):
        for dim, index in enumerate(kept):
            tensor = tensor.index_select(dim, index)
        assert torch.equal(packed, tensor)


@pytest.mark.skipif(compiled is None, reason="built without C++")
def test_only_what_the_machine_has():
    with pytest.raises(ValueError, match="set must be 2"):
        compiled.use_instruction_set(9)
