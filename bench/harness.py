"""What a benchmark states (`Case`) and how it is checked and timed.

An op's file `bench/<op>.py` holds a list `CASES`. For example:

    CASES = [
        Case(
            name="activation_attention 64x256x56x56 float32",
            op="activation_attention",
            make=lambda device: (torch.randn(64, 256, 56, 56, device=device),),
            run=lambda x: paamops.activation_attention(x),
            check=lambda x: x.double().abs().mean((0, 2, 3)),
            baselines={"eager": eager, "compile": compiled(eager), "sum": lambda x: x.sum()},
            bytes=64 * 256 * 56 * 56 * 4,
            target={"eager": 8, "compile": 1, "sum": 1 / 1.2},
        )
    ]
"""

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.tolerances import assert_close

from . import machine


@dataclass(frozen=True)
class Case:
    """One benchmark. Every callable but `make` takes the inputs that `make` returned, and must leave them unchanged."""

    name: str  # unique; says op, shapes and dtype
    op: str
    make: Callable  # make(device) -> tuple of inputs
    run: Callable  # the op
    check: Callable  # what `run` must return, from float64 arithmetic: a tensor or a (nested) sequence of tensors
    baselines: dict[str, Callable] = field(default_factory=dict)  # "eager", "compile" (see `compiled`), a peer
    bytes: int | None = None  # that must be moved: what is read once plus what is written once
    flops: int | None = None  # that must be done
    target: dict[str, float] = field(default_factory=dict)  # baseline -> its time / ours, at least; never asserted
    cold: bool = True  # on a CPU: flush the last-level cache before every call. On a GPU it is always flushed.
    devices: tuple[str, ...] = ("cpu", "cuda")


def compiled(function):
    """`function` under torch.compile, which is imported at the first call only; the harness reports that call apart."""
    compiled_function = None

    def call(*inputs):
        nonlocal compiled_function
        if compiled_function is None:
            compiled_function = torch.compile(function, dynamic=False)
        return compiled_function(*inputs)

    return call


def all_cases():
    """Every case of every `bench/<op>.py`, in the order of the files' names."""
    package = importlib.import_module(__package__)
    files = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [
        importlib.import_module(f"{__package__}.{name}") for name in files if not name.startswith(("_", "test_"))
    ]
    cases = [case for module in modules for case in getattr(module, "CASES", [])]
    names = [case.name for case in cases]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"case names must be unique; these are not: {sorted(duplicates)}")
    return cases


def verify(case, inputs):
    """Raise AssertionError unless `case.run` returns what `case.check` does, within the tolerance of its dtypes."""
    actual, expected = _tensors(case.run(*inputs)), _tensors(case.check(*inputs))
    assert len(actual) == len(expected), f"{len(actual)} tensors returned, {len(expected)} expected"
    for mine, right in zip(actual, expected, strict=True):
        if mine.is_floating_point():
            assert_close(mine.detach().cpu(), right.detach().cpu(), mine.dtype)
        else:
            assert torch.equal(mine.cpu(), right.cpu()), "the integers or flags differ"


def measure(case, device, seconds):
    """Check, then time ours and the baselines in turns, for about `seconds` each. Returns a dict of plain values.

    Times are in milliseconds. `ratio` is a baseline's median over ours: above 1, ours is the faster.
    A baseline that raises is reported under `failed` and left out.
    """
    inputs = case.make(device)
    verify(case, inputs)
    functions, first, failed = {}, {}, {}
    for name, function in {"ours": case.run, **case.baselines}.items():
        if name.startswith("compile"):
            torch.compiler.reset()
        start = time.perf_counter()
        try:
            function(*inputs)
            _synchronize(device)
        except Exception as error:  # a peer may be missing or torch.compile may lack a compiler; ours has just run
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        functions[name], first[name] = function, time.perf_counter() - start

    samples = time_in_turns(functions, inputs, device, seconds, cold=case.cold)
    times = {name: _summary(values) for name, values in samples.items()}
    ours = times["ours"]["median"]
    ratio = {name: times[name]["median"] / ours for name in times if name != "ours"}
    return {
        "op": case.op,
        "times": times,
        "ratio": ratio,
        "target": {n: {"at_least": t, "met": n in ratio and ratio[n] >= t} for n, t in case.target.items()},
        "compile_s": {name: first[name] for name in first if name.startswith("compile")},
        "failed": failed,
        "gbytes_per_s": case.bytes / ours / 1e6 if case.bytes else None,
        "gflops_per_s": case.flops / ours / 1e6 if case.flops else None,
    }


def time_in_turns(functions, inputs, device, seconds, cold=True):
    """Milliseconds of every call of each function, one of each per round, so that a slow spell hits them all alike."""
    timer = _cuda_round if torch.device(device).type == "cuda" else _cpu_round
    flush = machine.cache_flusher(device) if cold or timer is _cuda_round else None
    start = time.perf_counter()
    estimates = timer(functions, inputs, flush, dict.fromkeys(functions, 1))  # warms up, too
    once = time.perf_counter() - start
    # A call much shorter than the clock's and the loop's own cost is repeated; a flushed one cannot be.
    calls = {name: 1 if flush else max(1, min(1000, round(0.2 / max(ms, 1e-4)))) for name, ms in estimates.items()}
    rounds = max(5, min(1000, round(seconds * len(functions) / max(once, 1e-6))))
    deadline = time.perf_counter() + 2 * seconds * len(functions)  # the first round may have been a lucky one
    samples = {name: [] for name in functions}
    for index in range(rounds):
        if index >= 5 and time.perf_counter() > deadline:
            break
        for name, ms in timer(functions, inputs, flush, calls).items():
            samples[name].append(ms)
    return samples


def bandwidth(device, seconds=0.5):
    """GB/s of a plain copy (bytes read plus bytes written) and of a read-only sum, beyond the last-level cache."""
    count = max(2**26, machine.cache_bytes(device))  # float32: at least 256 MiB and four times the cache
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    functions = {"copy": lambda a, b: b.copy_(a), "sum": lambda a, b: a.sum()}
    samples = time_in_turns(functions, (source, target), device, seconds)
    return {
        "copy": 2 * source.nbytes / statistics.median(samples["copy"]) / 1e6,
        "sum": source.nbytes / statistics.median(samples["sum"]) / 1e6,
    }


def _cpu_round(functions, inputs, flush, calls):
    result = {}
    for name, function in functions.items():
        if flush:
            flush()
        start = time.perf_counter()
        for _ in range(calls[name]):
            function(*inputs)
        result[name] = (time.perf_counter() - start) * 1e3 / calls[name]
    return result


def _cuda_round(functions, inputs, flush, calls):
    events = {}
    for name, function in functions.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()  # also keeps the GPU busy while the launches queue up behind it, so that their cost does not show
        start.record()
        function(*inputs)
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def _synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _summary(values):
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
        "calls": len(ordered),
    }


def _tensors(result):
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)]
