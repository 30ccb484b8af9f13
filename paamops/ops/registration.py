"""How an op reaches the PyTorch dispatcher, which is the only dispatch there is.

Schemas are defined here in Python, so the package imports and works without a compiler. `csrc/<op>.cpp` registers the
CPU kernel under the same name when `paamops._C` is loaded, and `triton_kernels/<op>.py` serves CUDA and ROCm. The
reference is registered below them all: it serves every device that has no kernel of its own.
"""

import importlib
import importlib.util
import warnings

import torch

OPS = []  # names of the ops, in the order in which they were defined

_library = torch.library.Library("paamops", "DEF")

try:
    import paamops._C as compiled
except ImportError as error:
    compiled = None
    warnings.warn(
        f"paamops runs without its C++ kernels ({error}): the reference ops serve, correct but slower. "
        "Install a C++ compiler and build with `pip install --no-build-isolation .`",
        UserWarning,
        stacklevel=2,
    )


def define(schema, *, reference, fake, setup_context=None, backward=None):
    """Register one opaque op under `paamops::` and return its callable.

    schema: "name(Tensor x, float p) -> Tensor", functional. reference: the pure-torch statement of the formula.
    fake: shapes and dtypes only. backward, setup_context: as for `torch.library.register_autograd`; a backward is an op
    too. The Triton launch is the function `<name>` in `triton_kernels/<op>.py`, where `<op>` is the name without
    `_backward`: it is found by the name and imported at its first call.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"paamops::{name}", fake, lib=_library)
    if _has_triton_kernel(name):
        _library.impl(name, lambda *args: _triton_kernel(name)(*args), "CUDA")
    if backward is None and name.endswith("_backward"):
        backward = _refuse_second_order
    if backward is not None:
        torch.library.register_autograd(f"paamops::{name}", backward, setup_context=setup_context, lib=_library)
    OPS.append(name)
    return getattr(torch.ops.paamops, name).default


def _refuse_second_order(ctx, *grads):
    raise RuntimeError("this op is differentiable once; its gradient has no gradient")


def build_info():
    """What was built, and which kernel serves which op on which device: a dict of plain strings.

    `"C++"` and `"Triton"` are kernels of their own, `"reference"` is the pure-torch op that serves where there is none.
    """

    def serves(name, key, kernel):
        return kernel if torch._C._dispatch_has_kernel_for_dispatch_key(f"paamops::{name}", key) else "reference"

    return {
        "torch": torch.__version__,
        "cpp": compiled.build_facts() if compiled else None,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": {name: {"cpu": serves(name, "CPU", "C++"), "cuda": serves(name, "CUDA", "Triton")} for name in OPS},
    }


def _triton_module(name):
    return f"paamops.triton_kernels.{name.removesuffix('_backward')}"


def _has_triton_kernel(name):
    return importlib.util.find_spec("triton") is not None and importlib.util.find_spec(_triton_module(name)) is not None


def _triton_kernel(name):
    return getattr(importlib.import_module(_triton_module(name)), name)
