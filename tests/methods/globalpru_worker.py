"""One of several processes that elect and learn together: `python -m tests.methods.globalpru_worker RANK WORLD FOLDER`.

In float64 and without batch norms, where any number of processes computes what one does, up to rounding.
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import paamops
from paamops.methods.networks import tensors_of
from tests.methods.paam_worker import batches
from tests.methods.processes import be_one
from tests.methods.worker import Cut, network

CUT = 2  # the training that does not come to its end where a run is to be resumed


def run(rank, world, state=None, resume=False, cut=None):
    """A whole run; each process votes with, and trains on, its own share of the images."""
    images, labels = batches()
    trainings, lines = [], []

    def train(model, epochs, start_epoch, penalty):
        trainings.append(1)
        if len(trainings) == cut:
            raise Cut
        wrapped = DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(32):
                optimizer.zero_grad()
                mine = batch[rank::world]
                loss = nn.functional.cross_entropy(wrapped(images[mine]), labels[mine]) + penalty()
                loss.backward()
                optimizer.step()

    def evaluate(model):
        return (model(images).argmax(1) == labels).double().mean()

    gp = paamops.GlobalPru(network(), images[:4], rate=0.4, beta=0.1, alpha=0.001)
    try:
        result = gp.run(
            train=train,
            evaluate=evaluate,
            epochs=4,
            images=images[rank::world],
            state=state,
            resume=resume,
            say=lines.append,
        )
    except Cut:
        return None
    return {
        "history": [{**vars(stage), "seconds": 0.0} for stage in result.history],
        "keep": result.keep,
        "votes": result.votes,
        "rankings": result.rankings,
        "tensors": tensors_of(result.model),
        "lines": len(lines),
        "trainings": len(trainings),
    }


def find(rank, world, folder):
    found = {"whole": run(rank, world, folder / "whole")}
    run(rank, world, folder / "cut", cut=CUT)
    found["resumed"] = run(rank, world, folder / "cut", resume=True)
    return found


if __name__ == "__main__":
    be_one(find)
