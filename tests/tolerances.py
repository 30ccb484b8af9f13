"""The one tolerance table. A reference in float64 decides; a test allows the rounding of the dtype it computes in.

`TOLERANCE[dtype]` serves elementwise results. Sums over n terms are accumulated in float32 (float64 for float64), so
their relative error does not grow with the input's dtype: compare those with `TOLERANCE[accumulator(dtype)]`.
"""

import torch

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
}

# Two whole networks that compute the same: rounding differs in every layer, since sums over fewer channels run in
# another order, and each layer passes it on.
NETWORK_TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.1, "atol": 0.1},
}


def accumulator(dtype):
    """The dtype in which the ops accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual, expected, dtype):
    """`actual`, computed in `dtype`, against a float64 `expected`; NaN equals NaN."""
    torch.testing.assert_close(
        actual.double(), expected.double(), equal_nan=True, check_device=False, **TOLERANCE[dtype]
    )
