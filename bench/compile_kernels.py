"""Compiles every GPU kernel ahead of time, as it would be launched, and reads what the compilers made of it.

    python -m bench.compile_kernels              a table: registers, spills, shared memory, load and store widths
    python -m bench.compile_kernels --json       the same as a list of records
    python -m bench.compile_kernels --target sm_90 --op relu_attention

The launchers themselves run, on meta tensors: only the launch at their end is replaced by Triton's own compilation for
the target. So signatures, specialisations and constants are those of a real launch, and no GPU is needed. The exit
status is 1 if a kernel spills, takes too many registers, or does not move its tiles 16 bytes at a time.
"""

import argparse
import collections
import concurrent.futures
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OPS = (
    "activation_attention",
    "relu_attention",
    "cumulative_threshold",
    "pack_channels",
    "filter_attention",
    "project_filters",
    "leaky_exponential",
    "tempered_sigmoid",
    "scale_channels",
    "scatter_channels",
    "vote_ranking",
    "ranking_loss",
    "channel_attention",
    "filter_norms",
    "filter_distances",
)
LIMITED_BY_ARITHMETIC = (  # their tiles are small and come from a cache: what is loaded is used many times over
    *("_range", "_sweep", "_combine_parts", "_interpolate", "_sweep_backward", "_weights", "_finish"),
    *("_project", "_add_sums", "_combine_channels", "_vote", "_combine_chunks"),
    *("_walk_back", "_add_tasks", "_ranking_gradients"),
    *("_pairs", "_add_blocks"),
)
MAX_REGISTERS = 128  # 4 programs of 4 warps still fit a multiprocessor


def cases(op):
    """(name, call) of every variant of an op; `call` launches it, and its backward, on meta tensors."""
    import torch

    module = importlib.import_module(f"paamops.triton_kernels.{op}")
    forward, backward = getattr(module, op), getattr(module, f"{op}_backward", None)
    empty = functools.partial(torch.empty, device="meta")
    floats = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

    def attention(shape, dtype, memory_format, p):
        x = empty(shape, dtype=dtype).to(memory_format=memory_format)
        *y, total, peak = forward(x, p)
        backward(*y, total, peak, *(y or [x]), peak, p)

    def pack(dtype, memory_format):
        x, index = empty(256, 128, 3, 3, dtype=dtype).to(memory_format=memory_format), empty(64, dtype=torch.int64)
        backward(forward([x], [index], [0, 0, -1, -1]), [index], [0, 0, -1, -1], list(x.shape))

    def filter_attention(heights, d, name, widest):
        rows, offsets = empty(sum(heights), 2 * d, dtype=floats[name]), [0, *itertools.accumulate(heights)]
        q, k, v = rows[:, :d], rows[:, d:], empty(len(heights), d, dtype=floats[name])
        x = forward(q, k, v, v[:, 0], offsets, widest)
        backward(x, q, k, v, offsets, widest)

    def project(heights, widths, columns, name):
        rows = empty(sum(n * d for n, d in zip(heights, widths, strict=True)), dtype=floats[name])
        result = forward(rows, empty(sum(widths), columns, dtype=floats[name]), heights, widths)
        backward(result, rows, heights, widths)

    def activation(count, name):
        x = empty(count, dtype=floats[name])
        score, total = forward(x, 0.5)
        backward(score, total, x, 0.5)

    def scale(shape, name, memory_format, of_s):
        x, s = empty(shape, dtype=floats[name]).to(memory_format=memory_format), empty(shape[1], dtype=floats[of_s])
        backward(forward(x, s), x, s)

    def scatter(shape, kept, name, memory_format):
        index, source = empty(kept, dtype=torch.int64), empty(shape[1], dtype=torch.int64)
        x = empty(shape[0], kept, *shape[2:], dtype=floats[name]).to(memory_format=memory_format)
        forward(forward(x, index, source), source, index)

    def ranking(shapes, name):
        saliencies = [empty(shape, dtype=floats[name]) for shape in shapes]
        rankings, tops = [empty(shape[1], dtype=torch.int64) for shape in shapes], [shape[1] // 2 for shape in shapes]
        backward(forward(saliencies, rankings, tops), saliencies, rankings, tops)

    def vote(images, channels, name):
        forward(empty(images, channels, dtype=floats[name]), empty(channels, channels, dtype=torch.int64))

    def filters(shapes, name, *p):
        axes = [axis for _, axis, _ in shapes]
        weights = [empty(shape, dtype=floats[name]) for shape, _, _ in shapes]
        forward(weights, axes, [group for _, _, group in shapes], *p)

    def excite(shape, name, memory_format, kind):
        x, hidden = empty(shape, dtype=floats[name]).to(memory_format=memory_format), max(4, shape[1] // 16)
        parameters = [empty(size) for size in ((hidden, shape[1]), (hidden,), (shape[1], hidden), (shape[1],))]
        y, *small = forward(x, *parameters, kind)
        backward(y, small[0], x, parameters[0], parameters[2], *small, kind)

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if op == "filter_attention":
        # Tables that leave layers direct, and that interpolate; the widths of ResNet-56, of VGG-16, one no power of 2.
        network, large = (16, 32, 64), (64, 512, 0, 1000)
        wanted = [(network, 32, "float32"), (network, 32, "float64"), (large, 32, "float32"), (large, 20, "float32")]
        for heights, d, name in [*wanted, (large, 5, "float32"), (large, 64, "float32"), (network, 5, "float64")]:
            call = functools.partial(filter_attention, heights, d, name, [0.5] * 24)
            yield f"{'+'.join(map(str, heights))} d={d} {name}", call
    elif op == "project_filters":
        for columns, name in ((64, "float32"), (64, "float64"), (20, "float32")):
            call = functools.partial(project, [16, 64, 512], [27, 576, 4608], columns, name)
            yield f"16x27+64x576+512x4608 to {columns} {name}", call
    elif op in ("leaky_exponential", "tempered_sigmoid"):
        for count, name in [*((26_560, name) for name in floats), (1000, "float32"), (10_001, "float32")]:
            yield f"{count} {name}", functools.partial(activation, count, name)
    elif op == "scale_channels":
        many, uneven, flat = (64, 256, 56, 56), (64, 24, 14, 14), (4096, 1024)
        wanted = [(many, name, "float32") for name in floats] + [(many, "bfloat16", "bfloat16")]
        for shape, name, of_s in [
            *wanted,
            ((128, 16, 32, 32), "float32", "float32"),
            *((s, "float32", "float32") for s in (uneven, flat)),
        ]:
            for layout, memory_format in list(formats.items())[: len(shape) // 2]:
                call = functools.partial(scale, shape, name, memory_format, of_s)
                yield f"{'x'.join(map(str, shape))} {name} {layout} s {of_s}", call
    elif op == "scatter_channels":
        many, uneven, flat = (64, 256, 56, 56), (64, 24, 14, 14), (4096, 1024)
        wanted = [*((many, 128, name) for name in floats), (uneven, 12, "float32"), (flat, 512, "float32")]
        for shape, kept, name in wanted:
            for layout, memory_format in list(formats.items())[: len(shape) // 2]:
                call = functools.partial(scatter, shape, kept, name, memory_format)
                yield f"{kept} of {'x'.join(map(str, shape))} {name} {layout}", call
    elif op == "ranking_loss":
        for name in floats:
            yield f"128x16+128x64+77x512 {name}", functools.partial(ranking, [(128, 16), (128, 64), (77, 512)], name)
        yield "128x16+128x32 float32", functools.partial(ranking, [(128, 16), (128, 32)], "float32")
    elif op == "vote_ranking":
        wanted = [*((256, 512, name) for name in floats), (256, 16, "float32"), (9, 77, "float64")]
        for images, channels, name in wanted:
            yield f"{images}x{channels} {name}", functools.partial(vote, images, channels, name)
    elif op in ("filter_norms", "filter_distances"):
        usual = [((64, 3, 7, 7), 0, 1), ((256, 64, 1, 1), 0, 1), ((512, 512, 3, 3), 0, 1)]
        for name in floats:
            for p in ((1,), (2,)) if op == "filter_norms" else ((),):
                yield f"ResNet {name} {p}", functools.partial(filters, usual, name, *p)
        upscale = [((64, 32, 4, 4), 1, 2), ((64, 32, 4, 4), 1, 1)]  # weights of a filter lie apart
        yield "transposed float32", functools.partial(filters, upscale, "float32", *((2,) * (op == "filter_norms")))
    elif op == "channel_attention":
        many, few, uneven = (64, 256, 56, 56), (1, 16, 512, 512), (64, 24, 14, 14)
        wanted = [*((many, name, 1) for name in floats), (many, "float32", 0), (many, "float32", 2)]
        for shape, name, kind in [
            *wanted,
            (few, "float32", 1),
            ((128, 16, 32, 32), "float32", 1),
            (uneven, "float32", 1),
        ]:
            for layout, memory_format in formats.items():
                call = functools.partial(excite, shape, name, memory_format, kind)
                yield f"{'x'.join(map(str, shape))} {name} {layout} activation {kind}", call
    elif op.endswith("attention"):
        # Many large maps are split over programs only where channels are adjacent, few large ones in both formats.
        many, few, small, flat = (64, 256, 56, 56), (1, 16, 512, 512), (256, 512, 8, 8), (4096, 1024)
        uneven = (64, 24, 14, 14)  # neither 24 nor 196 is a multiple of 16, which is all that Triton finds by itself
        wanted = [(many, name, 1.0) for name in ("float32", "float16", "bfloat16")]
        wanted += [(many, "float32", 2.0), (many, "float32", 3.0), (many, "float64", 3.0)]
        wanted += [(few, "float32", 1.0), (small, "float16", 1.0), (flat, "float32", 1.0), (uneven, "float32", 1.0)]
        for shape, name, p in wanted:
            for layout, memory_format in list(formats.items())[: len(shape) // 2]:
                call = functools.partial(attention, shape, floats[name], memory_format, p)
                yield f"{'x'.join(map(str, shape))} {name} {layout} p={p:g}", call
    elif op == "cumulative_threshold":
        budget = empty((), dtype=torch.int64)
        for count, name, weighted in [*((1_000_000, name, False) for name in floats), (1_000_003, "float32", True)]:
            costs = empty(count, dtype=torch.int64) if weighted else None
            call = functools.partial(forward, empty(count, dtype=floats[name]), costs, budget)
            yield f"{count} {name}{' with costs' * weighted}", call
    else:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            for layout, memory_format in formats.items():
                yield f"{str(dtype)[6:]} {layout}", functools.partial(pack, dtype, memory_format)


def tile_bytes(kernel, arguments):
    """Bytes of every tensor tile that one step of the kernel's main loop loads, and of every one that it stores."""

    def element(name):
        return arguments[name].element_size()

    if kernel in ("_forward", "_first_maximum", "_backward"):
        tile = arguments["ROWS"] * arguments["COLS"] * element("x")
        relu = arguments.get("RELU", False)
        return [tile] * (1 + (kernel == "_backward" and relu)), [tile] * (kernel == "_backward" or relu)
    if kernel == "_combine":
        return [32 * arguments["ROWS"] * element("total")] * 2, []
    if kernel in ("_histogram", "_sum_equals", "_keep"):
        return [arguments["TILE"] * element("scores")] + [arguments["TILE"] * 8] * arguments["WEIGHTED"], []
    if kernel == "_move_blocks":  # what is gathered or scattered goes by elements, the other side by tiles
        tile = [arguments["BLOCK"] * arguments["ELEMENT"].primitive_bitwidth // 8]
        return (tile, []) if arguments["SCATTER"] else ([], tile)
    if kernel in ("_activate", "_activation_gradient"):  # whole blocks, beside which the last one has its own accesses
        backward = kernel == "_activation_gradient"
        tile = arguments["BLOCK"] * element("x")
        return [tile] * (1 + backward), [tile]
    if kernel in ("_scale", "_gradients"):
        tile = arguments["ROWS"] * arguments["COLS"] * element("x")
        return [tile] * (1 + (kernel == "_gradients")), [tile]
    if kernel == "_scatter":  # adjacent channels are looked up one by one
        tile = [arguments["ROWS"] * arguments["COLS"] * element("x")]
        if arguments["LAYOUT"] != "rows":
            return tile, tile
        return [], tile if arguments["ALIGN"] * element("x") >= 16 else []
    if kernel in ("_squeeze", "_excite"):  # x is not read where neither its value nor its sign is wanted
        tile, gradient = arguments["ROWS"] * arguments["COLS"] * element("x"), arguments["GRADIENT"]
        reads_x = kernel == "_squeeze" or arguments["ACTIVATION"] != 0 or not gradient
        return [tile] * (reads_x + gradient), [tile] * (kernel == "_excite")
    if kernel == "_norms":
        return [arguments["ROWS"] * arguments["COLS"] * arguments["ELEMENT"].primitive_bitwidth // 8], []
    if kernel in LIMITED_BY_ARITHMETIC:
        return [], []
    raise ValueError(f"how many bytes does {kernel} load and store? say so in tile_bytes of bench/compile_kernels.py")


def compile_op(op, target):
    """One record per distinct kernel that the variants of `op` launch on `target`. Runs in a process of its own, which
    has no device from then on.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if not isinstance(importlib.import_module("paamops.triton_kernels.attention")._forward, JITFunction):
        sys.exit("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    launch, records, seen, case = JITFunction.run, [], set(), None

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            arguments = {**dict(zip(self.arg_names, args, strict=False)), **options}
            facts = _resources(kernel, target) | _accesses(kernel)
            bytes_at_once = 16 * options["num_warps"] * TARGETS[target][2]
            for moved, tiles in zip(("loads", "stores"), tile_bytes(self.__name__, arguments), strict=True):
                facts[f"wide_{moved}"] = facts[moved].get(16, 0)
                facts[f"expected_{moved}"] = sum(tile // bytes_at_once for tile in tiles)
            records.append({"op": op, "case": case, "kernel": self.__name__, "target": target, **facts})
        return kernel

    driver.set_active(_NoDevice(GPUTarget(*TARGETS[target])))
    JITFunction.run = compile_only
    try:
        for case, call in cases(op):  # noqa: B007  compile_only names the case in its record
            call()
    finally:
        JITFunction.run = launch
    return records


def problems(record):
    """What is wrong with a kernel, as a list of sentences; empty if all is well."""
    wrong = []
    if record["spilled"]:
        wrong.append(f"spills {record['spilled']} (bytes, on AMD registers)")
    if record["registers"] > MAX_REGISTERS:
        wrong.append(f"takes {record['registers']} registers, more than {MAX_REGISTERS}")
    for moved in ("loads", "stores"):
        wide, expected = record[f"wide_{moved}"], record[f"expected_{moved}"]
        if wide < expected:
            wrong.append(f"has {wide} {moved} of 16 bytes where its tiles need {expected}")
    return wrong


class _NoDevice:
    """What Triton asks of the active driver in order to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)

    def get_current_stream(self, device):
        return 0


def _resources(kernel, target):
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        return {"registers": int(found["vgpr_count"]), "spilled": spilled, "shared": kernel.metadata.shared}
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = pathlib.Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", binary]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    # These kernels have no arrays of their own: whatever is on the stack was spilled.
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": found["SHARED"]}


def _accesses(kernel):
    """How many instructions load from and store to global memory, by their width in bytes."""
    loads, stores = collections.Counter(), collections.Counter()
    if "amdgcn" in kernel.asm:
        pattern = r"(?:buffer|global|flat)_(load|store)_(?:[us](?=byte|short))?(byte|short|dword(?:x\d)?)"
        widths = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        found = [(kind, widths[size]) for kind, size in re.findall(pattern, kernel.asm["amdgcn"])]
    else:
        pattern = r"(ld|st)\.global(?:\.(?!v\d|b\d)\w+(?:::\w+)*)*(?:\.v(\d))?\.[a-z]+(\d+)"
        found = [
            (kind, int(lanes or 1) * int(bits) // 8) for kind, lanes, bits in re.findall(pattern, kernel.asm["ptx"])
        ]
    for kind, width in found:
        (loads if kind in ("load", "ld") else stores)[width] += 1
    return {"loads": dict(loads), "stores": dict(stores)}


def _widths(counts):
    return " ".join(f"{width}Bx{counts[width]}" for width in sorted(counts, reverse=True)) or "-"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--op", choices=OPS, help="only this one")
    options = parser.parse_args(arguments)
    work = [
        (op, target) for target in TARGETS for op in OPS if options.target in (None, target) if options.op in (None, op)
    ]
    workers = max(1, min(len(work), os.cpu_count() or 1))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        records = [record for part in pool.map(compile_op, *zip(*work, strict=True)) for record in part]
    if options.json:
        json.dump([{**record, "problems": problems(record)} for record in records], sys.stdout, indent=1)
    else:
        for record in records:
            print(
                f"{record['target']:7} {record['op']:21} {record['kernel']:15} {record['case']:45} "
                f"{record['registers']:3} regs  {record['spilled']} spilled  {record['shared']:5} B shared  "
                f"loads {_widths(record['loads'])}  stores {_widths(record['stores'])}",
                *problems(record),
            )
        print(f"{len(records)} kernels, {sum(bool(problems(record)) for record in records)} with problems")
    return 1 if any(problems(record) for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
