"""activation_attention against eager PyTorch, torch.compile and the plain sum, which reads the same bytes once."""

import math

import torch

from paamops.ops.activation_attention import activation_attention

from .harness import Case, compiled

LARGE = (64, 256, 56, 56)


def eager(x):
    """The mean in the accumulator dtype, which for a half is what the op returns."""
    return x.abs().mean((0, *range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))


def case(shape, dtype, layout="contiguous", p=1, target=None):
    """One case: the mean of |x|^p over (N, *spatial)."""

    def make(device):
        x = torch.randn(shape, device=device).to(dtype)
        return (x.to(memory_format=torch.channels_last) if layout == "channels_last" else x,)

    def power(x):
        return x.abs().pow(p).mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    baseline = eager if p == 1 else power
    return Case(
        name=f"activation_attention {'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}"
        + (f" p={p}" if p != 1 else ""),
        op="activation_attention",
        make=make,
        run=lambda x: activation_attention(x, p),
        check=lambda x: (x.double().abs() ** p).mean((0, 2, 3)).float(),
        baselines={"eager": baseline, "compile": compiled(baseline), "sum": lambda x: x.sum()},
        bytes=math.prod(shape) * torch.empty((), dtype=dtype).element_size(),
        target=target or {},
    )


CASES = [
    case(LARGE, torch.float32, target={"eager": 8, "compile": 1, "sum": 1 / 1.2}),
    case(LARGE, torch.float32, "channels_last", target={"eager": 8, "compile": 1, "sum": 1 / 1.2}),
    case(LARGE, torch.bfloat16),
    case(LARGE, torch.float16),
    case(LARGE, torch.float32, p=2),
    case(LARGE, torch.float32, p=1.5),
    case((64, 2048, 7, 7), torch.float32),
    case((256, 16, 32, 32), torch.float32, "channels_last"),
]
