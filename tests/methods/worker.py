"""One of several processes that prune networks together: `python -m tests.methods.worker RANK WORLD FOLDER`.

The training averages the gradients over the shards of each batch, in float64 and without batch norms, so that any
number of processes comes to the same weights up to rounding.
"""

import torch
from torch import distributed, nn

import paamops
from paamops.methods.networks import tensors_of
from tests.methods.processes import be_one

CUT = 5  # the training that does not come to its end where a run is to be resumed


class Cut(Exception):
    """What a kill is within one process."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 14, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(56, 4),
    ).double()  # fmt: skip


def run(rank, world, state=None, resume=False, cut=None, torn=False):
    """What this process found. `torn`: all but the first evaluate, score and train something else."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (64,), generator=generator)
    model = network()
    whole = sum(parameter.numel() for parameter in model.parameters())
    trainings, lines = [], []
    torn = torn and rank > 0

    def train(model, epochs, start_epoch):
        trainings.append(1)
        if len(trainings) == cut:
            raise Cut
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(32):
                model.zero_grad()
                mine = batch[rank::world]
                loss = nn.functional.cross_entropy(model(images[mine]), labels[mine], reduction="sum") / len(batch)
                loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if world > 1:
                            distributed.all_reduce(parameter.grad)
                        parameter -= 0.05 * parameter.grad
        if torn:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))

    def evaluate(model):
        if torn:
            return float("nan")  # an error, were it looked at
        return 1 - (1 - sum(parameter.numel() for parameter in model.parameters()) / whole) ** 2

    method = paamops.AAP(
        model,
        torch.rand_like(images[:16]) if torn else images[:16],
        train=train,
        evaluate=evaluate,
        objective=paamops.Objective(max_accuracy_drop=0.3),
        epochs=4,
        rewind=0.5,
        state=state,
        resume=resume,
        say=lines.append,
        quiet=True,
    )
    try:
        result = method.run()
    except Cut:
        return None
    return {
        "history": [{**vars(entry), "seconds": 0.0} for entry in result.history],
        "chosen": result.chosen,
        "keep": result.keep,
        "tensors": tensors_of(result.model),
        "lines": len(lines),
        "trainings": len(trainings),
    }


def find(rank, world, folder):
    found = {"whole": run(rank, world, folder / "whole")}
    run(rank, world, folder / "cut", cut=CUT)
    found["resumed"] = run(rank, world, folder / "cut", resume=True)
    found["torn"] = run(rank, world, torn=True)
    return found


if __name__ == "__main__":
    be_one(find)
