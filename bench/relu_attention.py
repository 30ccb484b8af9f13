"""relu_attention against a ReLU followed by its score, and against the ReLU alone: what scoring costs on top."""

import math

import torch

from paamops.ops.relu_attention import relu_attention

from .harness import Case, compiled

SHAPE = (64, 256, 56, 56)


def eager(x):
    """ReLU, then the mean over (N, *spatial)."""
    y = torch.relu(x)
    return y, y.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def case(dtype, layout="contiguous"):
    """One case: y, and the mean of y per channel."""

    def make(device):
        x = torch.randn(SHAPE, device=device).to(dtype)
        return (x.to(memory_format=torch.channels_last) if layout == "channels_last" else x,)

    return Case(
        name=f"relu_attention {'x'.join(map(str, SHAPE))} {str(dtype)[6:]} {layout}",
        op="relu_attention",
        make=make,
        run=relu_attention,
        check=lambda x: (x.double().relu(), x.double().relu().mean((0, 2, 3)).float()),
        baselines={"eager": eager, "compile": compiled(eager), "relu alone": torch.relu},
        bytes=2 * math.prod(SHAPE) * torch.empty((), dtype=dtype).element_size(),
    )


CASES = [case(torch.float32), case(torch.float32, "channels_last"), case(torch.bfloat16)]
