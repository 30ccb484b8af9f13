"""A run of PAAM on the digits that a test kills: `python -m tests.methods.paam_job FOLDER OUT MODE` resumes it.

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

MODES = {
    "frozen": {"frozen": True},
    "both": {"frozen": False, "trained": True},
    "one stage": {"frozen": False},
}


def run(folder, out, mode):
    torch.set_num_threads(1)
    dataset = paamops.data.load("digits")
    train_images, labels = dataset.normalise(dataset.train.images[:384]), dataset.train.labels[:384]
    held_out = dataset.normalise(dataset.validation.images)

    def train(model, epochs, start_epoch, penalty):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(96):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(train_images[batch]), labels[batch]) + penalty()).backward()
                optimizer.step()
                print("step", flush=True)

    def evaluate(model):
        return (model(held_out).argmax(1) == dataset.validation.labels).double().mean()

    result = paamops.PAAM(network(), train_images[:64], params=0.6).run(
        train=train, evaluate=evaluate, epochs=4, learn=3, rounds=3, state=folder, resume=True, **MODES[mode]
    )
    history = [asdict(entry) | {"seconds": 0} for entry in result.history]
    facts = {"history": json.dumps(history), "chosen": str(result.chosen), "message": result.message}
    tensors = {f"dense.{name}": tensor for name, tensor in tensors_of(result.dense).items()}
    tensors |= tensors_of(result.model)
    tensors |= {":keep": result.keep, ":scores": result.scores, ":learning": result.learning, ":steps": result.steps}
    save_file(tensors, out, metadata=facts)


if __name__ == "__main__":
    run(*sys.argv[1:])
