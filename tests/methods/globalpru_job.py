"""A run of GlobalPru on the digits that a test kills: `python -m tests.methods.globalpru_job FOLDER OUT` resumes it.

It says a line for every training step, so that the test knows that it is at work.
"""

import json
import sys
from dataclasses import asdict

import torch
from safetensors.torch import save_file
from torch import nn

import paamops
from paamops.methods.networks import tensors_of
from tests.methods.job import network


def run(folder, out):
    torch.set_num_threads(1)
    dataset = paamops.data.load("digits")
    train_images, labels = dataset.normalise(dataset.train.images[:384]), dataset.train.labels[:384]
    held_out = dataset.normalise(dataset.validation.images)

    def train(model, epochs, start_epoch, penalty):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(96):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(train_images[batch]), labels[batch])
                (loss + penalty()).backward()
                optimizer.step()
                print("step", flush=True)

    def evaluate(model):
        return (model(held_out).argmax(1) == dataset.validation.labels).double().mean()

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    gp = paamops.GlobalPru(network(), train_images[:8], rate=0.4, mode="mixed", beta=0.01)
    result = gp.run(
        train=train,
        evaluate=evaluate,
        epochs=5,
        images=[train_images],
        loss=loss,
        batches=[(train_images[:64], labels[:64])],
        state=folder,
        resume=True,
    )
    history = [asdict(stage) | {"seconds": 0} for stage in result.history]
    tensors = {f"whole.{name}": tensor for name, tensor in tensors_of(result.whole).items()}
    tensors |= tensors_of(result.model)
    tensors |= {f":ranking {k}": ranking for k, ranking in enumerate(result.rankings)}
    tensors |= {f":votes {k}": votes for k, votes in enumerate(result.votes)}
    tensors |= {":keep": result.keep, ":traces": result.traces, ":kendall": result.kendall}
    save_file(tensors, out, metadata={"history": json.dumps(history), "message": result.message})


if __name__ == "__main__":
    run(*sys.argv[1:])
