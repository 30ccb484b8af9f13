"""What a launcher asks of the device."""

import contextlib

import torch
import triton

NO_DEVICE = 108  # multiprocessors assumed where there is no GPU: interpreter and ahead-of-time compilation


def processors(x):
    """The number of multiprocessors (compute units on AMD) of the device that holds `x`."""
    if not x.is_cuda:
        return NO_DEVICE
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def on(x):
    """Context in which Triton launches on the device that holds `x`, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def registers(kernel, most=128):
    """Launch options that let a kernel have so many registers a thread, where the target is NVIDIA's.

    Left to itself the assembler may settle for fewer, for more programs at a time, and spill a handful.
    """
    if not isinstance(kernel, triton.runtime.jit.JITFunction):  # interpreted: there is no target
        return {}
    cuda = triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": most} if cuda else {}
