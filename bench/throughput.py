"""python -m bench.throughput: how fast a network trains, and what limits it; the results go to bench/results/.

Images are random, and on the device before the clock runs; augmentation, forward, backward and SGD are those of
`paamops.training`. FLOPs of a training image are three times those of its forward pass, which `paamops.trace` counts.
"""

import argparse
import datetime
import statistics
import sys
import time

import torch

import paamops
from paamops import cli, data, models, training

from . import machine
from .__main__ import RESULTS, save

EPOCH = 45_000  # training images of CIFAR-10 without its validation split
DTYPES = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def main(arguments=None):
    """Measure one network, print and store it. Exit code 2 if there is no such device."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: no GPU that torch can use on this machine; nothing was timed", file=sys.stderr)
        return 2
    fabric = training.make_fabric(options.device, options.precision)
    torch.manual_seed(0)
    model = models.build(options.model)
    model.to(fabric.device)
    images = random_images(options.batch_size * options.steps).to(fabric.device)

    compiled = options.compiled
    first, seconds = windows(model, images, fabric, options.batch_size, options.windows, options.model, compiled)
    rates = sorted(len(images.train) / window for window in seconds)
    speed = statistics.median(rates)
    flops = 3 * paamops.trace(model, images.normalise(images.train.images[:1])).cost().flops
    peak = matmul_rate(fabric.device, DTYPES[options.precision])
    result = {
        "images_per_s": {"median": speed, "least": rates[0], "most": rates[-1], "windows": len(rates)},
        "flops_per_image": flops,
        "flops_per_s": speed * flops,
        "matmul_flops_per_s": peak,
        "share_of_matmul": speed * flops / peak,
        "epoch_s": EPOCH / speed,
        "first_window_s": first,
    }
    name = f"{options.model} batch {options.batch_size} {options.precision}{' compiled' if compiled else ''}"
    print(
        f"{name}: {speed:,.0f} images/s ({rates[0]:,.0f} to {rates[-1]:,.0f} in {len(rates)} windows), "
        f"{speed * flops / 1e12:.3g} TFLOP/s = {speed * flops / peak:.1%} of the measured matmul "
        f"({peak / 1e12:.3g} TFLOP/s), {EPOCH / speed:.3g} s an epoch of {EPOCH:,} images"
    )
    if not options.no_save:
        run = machine.facts(options.device)
        run["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        path = RESULTS / f"throughput-{machine.name(options.device)}.json"
        save(path, run, {name: result})
        print(f"wrote {path}")
    return 0


def windows(model, dataset, fabric, batch_size, count, name, compiled):
    """(seconds of the first window, in which all is compiled and chosen; seconds of `count` more, after a warm-up)."""
    seconds = []
    model.train()
    with training.prepared(model, dataset, fabric, training.schedule_for(name), compiled) as (wrapped, sgd, layout):
        for window in range(count + 2):
            start = time.perf_counter()
            loss = training.train_epoch(wrapped, sgd, dataset, fabric, batch_size, window, layout)
            loss.item()  # waits for all of it
            seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[2:]


def random_images(count):
    """A Dataset of `count` images (3, 32, 32) of noise, in ten classes."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    split = data.Split(images, torch.arange(count) % 10)
    half = torch.full((3,), 127.5)
    return data.Dataset("noise", 10, split, split, split, half, half, flip=True)


def matmul_rate(device, dtype):
    """FLOP/s of a large square matrix product on `device`, the median of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(13):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for it
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[3:])


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.NETWORKS, default="resnet56")
    parser.add_argument("--batch-size", type=cli.positive, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="32-true")
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")
    parser.add_argument("--steps", type=cli.positive, default=50, help="in each window (default: 50)")
    parser.add_argument("--windows", type=cli.positive, default=10, help="timed, after two that are not (default: 10)")
    parser.add_argument("--no-save", action="store_true", help="print only, leave bench/results/ as it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
