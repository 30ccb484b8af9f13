"""A run of AAP on the digits that a test kills: `python -m tests.methods.job FOLDER OUT` resumes it.

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


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 10, 3, stride=2), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def run(folder, out):
    torch.set_num_threads(1)
    dataset = paamops.data.load("digits")
    train_images, labels = dataset.normalise(dataset.train.images[:384]), dataset.train.labels[:384]
    held_out = dataset.normalise(dataset.validation.images)

    def train(model, epochs, start_epoch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(96):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train_images[batch]), labels[batch]).backward()
                optimizer.step()
                print("step", flush=True)

    def evaluate(model):
        return (model(held_out).argmax(1) == dataset.validation.labels).double().mean()

    result = paamops.AAP(
        network(),
        train_images[:64],
        train=train,
        evaluate=evaluate,
        objective=paamops.Objective(max_accuracy_drop=0.05),
        epochs=4,
        rewind=0.5,
        rounds=8,
        state=folder,
        resume=True,
        quiet=True,
    ).run()
    history = [asdict(entry) | {"seconds": 0} for entry in result.history]
    facts = {"history": json.dumps(history), "chosen": str(result.chosen), "message": result.message}
    save_file({":keep": result.keep, **tensors_of(result.model)}, out, metadata=facts)


if __name__ == "__main__":
    run(*sys.argv[1:])
