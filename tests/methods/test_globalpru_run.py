"""GlobalPru.run: its stages, what it returns, resumed bit for bit, and what it refuses."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import paamops
from paamops import excitation
from paamops.methods.globalpru_run import GlobalPruResult
from paamops.packing import mask
from tests.methods.test_paam_run import task
from tests.methods.trainers import assert_same_tensors, images, small
from tests.tolerances import NETWORK_TOLERANCE


class Trainer:
    """A training with SGD that notes its calls; the `cut`-th of them does not come to its end."""

    def __init__(self, x, labels, cut=None):
        self.x, self.labels, self.cut, self.calls, self.penalties = x, labels, cut, [], []

    def __call__(self, model, epochs, start_epoch, penalty):
        self.calls.append((epochs, start_epoch, model.training))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.x)).split(12):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(self.x[batch]), self.labels[batch])
                (loss + penalty()).backward()
                optimizer.step()
            if len(self.calls) == self.cut:
                raise RuntimeError("the cluster is on fire")
        self.penalties.append(float(torch.as_tensor(penalty()).detach()))


def accuracy(x, labels):
    return lambda model: (model(x).argmax(1) == labels).double().mean()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def toy():
    x, labels = task()
    return small(widths=(8, 12)), x, labels


def run(toy, cut=None, settings=None, **others):
    model, x, labels = toy
    gp = paamops.GlobalPru(copy.deepcopy(model), x[:2], **{"beta": 0.05, **(settings or {"rate": 0.5})})
    trainer = Trainer(x, labels, cut)
    others = {"epochs": 4, "images": lambda: list(x.split(20)), **others}
    if gp.mode == "mixed":
        others |= {"loss": loss, "batches": [(x[:16], labels[:16])]}
    return gp, trainer, gp.run(train=trainer, evaluate=accuracy(x, labels), **others)


def plain(history):
    return [replace(stage, seconds=0.0) for stage in history]


def assert_same_result(one, other):
    assert plain(one.history) == plain(other.history)
    assert torch.equal(one.keep, other.keep)
    assert_same_tensors(one.model, other.model)
    assert_same_tensors(one.whole, other.whole)
    for name in ("votes", "rankings"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
    for name in ("rates", "kendall", "overlap"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("settings", [{"rate": 0.5}, {"flops": 0.6}, {"rate": 0.4, "mode": "mixed"}], ids=str)
def test_a_run(toy, settings):
    lines = []
    before = copy.deepcopy(toy[0])
    gp, trainer, result = run(toy, settings=settings, say=lines.append)
    assert isinstance(result, GlobalPruResult)
    assert trainer.calls == [(4, 0, True), (4, 0, True), (2, 2, True)]
    warm, ranked, tuned = trainer.penalties
    assert 0 < warm < ranked
    assert tuned == 0
    assert [stage.name for stage in result.history] == ["warm", "ranked", "pruned", "tuned"]
    assert len(lines) == 4
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    assert [stage.params for stage in result.history] == [whole.params] * 2 + [left.params] * 2
    assert [stage.flops for stage in result.history] == [whole.flops] * 2 + [left.flops] * 2
    assert [stage.kendall is None for stage in result.history] == [False, False, True, True]
    first, second, *_ = result.history
    assert first.kendall == pytest.approx(float(result.kendall[0].mean()))
    assert second.overlap == pytest.approx(float(result.overlap[1].mean()))
    assert [int(votes.sum()) for votes in result.votes] == [48 * 8, 48 * 12]
    assert result.layers == ("0", "3")
    x = toy[1]
    evaluate = accuracy(x, toy[2])
    assert evaluate(result.model) == result.history[3].accuracy
    assert evaluate(result.whole) == result.history[1].accuracy
    assert evaluate(mask(result.whole, result.channels, result.keep)) == result.history[2].accuracy
    assert not any(module.training for each in (result.model, result.whole) for module in each.modules())
    assert sum(p.numel() for p in result.model.parameters()) == left.params
    assert (result.traces is None) == ("mode" not in settings)
    # The caller's network has its excitations and else what it had.
    plain_model = copy.deepcopy(gp.model)
    excitation.remove(plain_model)
    assert_same_tensors(plain_model, before)
    assert gp.rankings == result.rankings
    packed = paamops.pack(result.whole, result.channels, result.keep).eval()
    twin = mask(result.whole, result.channels, result.keep)
    torch.testing.assert_close(packed(x), twin(x), **NETWORK_TOLERANCE[torch.float32])


def test_a_trained_network_is_warmed_up_shortly(toy):
    _, trainer, _ = run(toy, trained=True, rewind=0.75)
    assert trainer.calls == [(1, 3, True), (4, 0, True), (1, 3, True)]
    _, trainer, result = run(toy, trained=True, rewind=0.0)
    assert trainer.calls == [(4, 0, True)] * 3
    assert "accuracy" in result.message


def test_the_same_seed_gives_the_same_network(toy):
    assert_same_result(run(toy)[2], run(toy)[2])


@pytest.mark.parametrize("settings", [{"rate": 0.5}, {"rate": 0.4, "mode": "mixed"}], ids=str)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_resumed_after_a_failure(toy, tmp_path, cut, settings):
    _, _, expected = run(toy, settings=settings)
    with pytest.raises(RuntimeError, match="the cluster is on fire"):
        run(toy, cut, settings, state=tmp_path)
    _, trainer, result = run(toy, settings=settings, state=tmp_path, resume=True)
    assert len(trainer.calls) == 4 - cut
    assert_same_result(result, expected)
    _, trainer, again = run(toy, settings=settings, state=tmp_path, resume=True)
    assert not trainer.calls
    assert_same_result(again, expected)


@pytest.mark.parametrize("stage", ["elected", "taught", "warm", "pruned"])
def test_resumed_after_any_write(toy, tmp_path, stage, monkeypatch):
    """As if it was killed right after it had stored this stage."""
    from paamops.methods.state import State

    _, _, expected = run(toy)
    usual = State.write

    def write(self):
        usual(self)
        if stage in (list(self.networks)[-1:] + [entry.name for entry in self.history[-1:]]):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(toy, state=tmp_path)
    assert_same_result(run(toy, state=tmp_path, resume=True)[2], expected)


def test_a_state_of_another_run_is_refused(toy, tmp_path):
    run(toy, state=tmp_path)
    with pytest.raises(ValueError, match="holds a run; resume it, or name another folder"):
        run(toy, state=tmp_path)
    for settings, key in (
        ({"rate": 0.4}, "asked"),
        ({"rate": 0.5, "beta": 0.1}, "penalty"),
        ({"rate": 0.5, "seed": 5}, "weights"),
    ):
        with pytest.raises(ValueError, match=f"is of another run: its {key}"):
            run(toy, settings=settings, state=tmp_path, resume=True)
    with pytest.raises(ValueError, match="is of another run: its context"):
        run(toy, state=tmp_path, resume=True, context={"batch": 3})
    (tmp_path / "elected.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is missing or damaged"):
        run(toy, state=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"epochs": 2.0}, ValueError, "epochs is 2.0"),
        ({"rewind": 1.5}, ValueError, "rewind is 1.5"),
        ({"say": 3}, TypeError, "say is a int"),
        ({"resume": True}, ValueError, "resume is True, but state is None"),
        ({"images": images(0)}, ValueError, "holds no images"),
        ({"images": iter([images()])}, TypeError, "images is a list_iterator, which ends"),
        ({"rewind": 0.9}, ValueError, "rewind is 0.9, which leaves none of the 4 epochs"),
    ],
)
def test_bad_arguments(toy, settings, error, message):
    with pytest.raises(error, match=message):
        run(toy, **settings)


def test_what_the_callers_functions_return(toy):
    model, x, labels = toy
    gp = paamops.GlobalPru(model, x[:2], rate=0.5)
    before = copy.deepcopy(gp.model)
    trainer = Trainer(x, labels)
    with pytest.raises(ValueError, match="evaluate returned nan in stage warm"):
        gp.run(train=trainer, evaluate=lambda model: math.nan, epochs=1, images=x)
    with pytest.raises(TypeError, match="train is a NoneType"):
        gp.run(train=None, evaluate=accuracy(x, labels), epochs=1, images=x)
    assert gp.model is model
    assert_same_tensors(gp.model, before)
    mixed = paamops.GlobalPru(small(), x[:2], rate=0.5, mode="mixed")
    with pytest.raises(ValueError, match="mixed rates are measured: loss must be a function"):
        mixed.run(train=trainer, evaluate=accuracy(x, labels), epochs=1, images=x)


def test_voters_that_are_drawn_are_drawn_again(toy, tmp_path):
    """Augmented images: the votes after a cut are those of the run that was not cut."""
    x = toy[1]

    def drawn():
        return [x + 0.5 * torch.randn_like(x)]

    _, _, expected = run(toy, images=drawn)
    with pytest.raises(RuntimeError, match="the cluster is on fire"):
        run(toy, 2, state=tmp_path, images=drawn)
    (tmp_path / "elected.safetensors").unlink()
    stored = json.loads((tmp_path / "state.json").read_text())
    stored |= {"networks": ["warm"], "history": []}
    (tmp_path / "state.json").write_text(json.dumps(stored))
    assert_same_result(run(toy, state=tmp_path, resume=True, images=drawn)[2], expected)


def test_whose_run_it_is_is_known_from_the_start(toy, tmp_path):
    with pytest.raises(RuntimeError, match="the cluster is on fire"):
        run(toy, 1, state=tmp_path)
    with pytest.raises(ValueError, match="is of another run: its penalty"):
        run(toy, settings={"rate": 0.5, "alpha": 0.5}, state=tmp_path, resume=True)


def test_numbers_of_numpy(toy, tmp_path):
    settings = {"rate": np.float32(0.5), "alpha": np.float32(0.001), "seed": np.int64(0)}
    run(toy, settings=settings, epochs=np.int64(2), rewind=np.float32(0.5), state=tmp_path)


def test_untrained_excitations_do_not_vote(toy):
    model, x, labels = toy
    gp = paamops.GlobalPru(model, x[:2], rate=0.5)
    with pytest.raises(RuntimeError, match="before warm-up"):
        gp.run(train=lambda *_: None, evaluate=accuracy(x, labels), epochs=1, images=x)
