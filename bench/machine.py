"""What this machine is, how fast it moves memory, and how to empty its caches."""

import os
import pathlib
import platform
import re
import subprocess

import torch


def facts(device):
    """Hardware and versions, as plain values: they stand beside every figure."""
    import paamops  # here, so that the helpers above need no build

    info = paamops.build_info()
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "device": gpu or cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": info["triton"],
        "compiler": compiler(),
        "cpp": info["cpp"],
    }


def name(device):
    """A file name for this machine's results: what was timed, and for a CPU the number of threads."""
    if torch.device(device).type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"{cpu_name()} {torch.get_num_threads()} threads")


def cache_bytes(device):
    """The last-level cache, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(text[:-1]) for path in sizes if (text := path.read_text().strip()).endswith("K")]
    return max(kib, default=32 * 1024) * 1024


def cache_flusher(device):
    """A function that leaves nothing useful in the last-level cache."""
    buffer = torch.ones(2 * cache_bytes(device) // 4, device=device)
    if buffer.is_cuda:
        return buffer.zero_
    return buffer.sum  # reading leaves clean lines: nothing is to be written back while the next call is timed


def cpu_name():
    """The processor's name as the operating system has it."""
    info = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def compiler():
    """The first line of the C++ compiler's version, or None."""
    try:
        run = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.splitlines()[0]


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
