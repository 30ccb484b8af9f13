"""One of several processes that learn scores together: `python -m tests.methods.paam_worker RANK WORLD FOLDER`.

In float64 and without batch norms, where any number of processes computes what one does, up to rounding.
"""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import paamops
from paamops.methods.networks import tensors_of
from tests.methods.processes import be_one
from tests.methods.worker import Cut, network

CUT = 3  # the training that does not come to its end where a run is to be resumed


def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (64,), generator=generator)


def embedded(rank, world):
    """What this process has after some steps of model and scores, both wrapped."""
    images, labels = batches()
    model = network()
    if rank:  # DistributedDataParallel gives all processes the first one's parameters
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    paam = paamops.PAAM(model, images[:4], params=0.5, seed=rank)
    wrapped = model
    if world > 1:
        wrapped, paam.attention = DistributedDataParallel(model), DistributedDataParallel(paam.attention)
    parameters = [*paam.attention.parameters(), *model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        with paam.scoring():
            logits = wrapped(images[rank::world])
            loss = nn.functional.cross_entropy(logits, labels[rank::world]) + paam.penalty()
        loss.backward()
        optimizer.step()
    attention = getattr(paam.attention, "module", paam.attention)
    return {
        "attention": tensors_of(attention),
        "model": tensors_of(model),
        "scores": paam.learned(),
        "keep": paam.keep().keep,
        "lambda": paam.lambda_,
        "packed": tensors_of(paam.prune()),
    }


def run(rank, world, state=None, resume=False, cut=None, torn=False):
    """A whole run. `torn`: all but the first evaluate and train something else."""
    images, labels = batches()
    trainings, lines = [], []
    torn = torn and rank > 0

    def train(model, epochs, start_epoch, penalty):
        trainings.append(1)
        if len(trainings) == cut:
            raise Cut
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(32):
                model.zero_grad()
                mine = batch[rank::world]
                loss = nn.functional.cross_entropy(model(images[mine]), labels[mine], reduction="sum") / len(batch)
                (loss + penalty() / world).backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is None:
                            continue
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
        return (model(images).argmax(1) == labels).double().mean()

    paam = paamops.PAAM(network(), images[:4], params=0.6, width=4)
    try:
        result = paam.run(
            train=train,
            evaluate=evaluate,
            epochs=4,
            learn=2,
            rounds=2,
            frozen=False,
            trained=True,
            state=state,
            resume=resume,
            say=lines.append,
        )
    except Cut:
        return None
    return {
        "history": [{**vars(entry), "seconds": 0.0} for entry in result.history],
        "chosen": result.chosen,
        "keep": result.keep,
        "scores": result.scores,
        "tensors": tensors_of(result.model),
        "lines": len(lines),
        "trainings": len(trainings),
    }


def find(rank, world, folder):
    found = {"embedded": embedded(rank, world), "whole": run(rank, world, folder / "whole")}
    run(rank, world, folder / "cut", cut=CUT)
    found["resumed"] = run(rank, world, folder / "cut", resume=True)
    found["torn"] = run(rank, world, torn=True)
    return found


if __name__ == "__main__":
    be_one(find)
