"""The law on networks nobody thought of: whatever trace makes of them, pack equals mask and the cost is exact.

A failing test prints the number of its network and its structure: `random_network(number)` makes it again.
"""

import contextlib
import functools
import random
import re
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import paamops
from paamops import packing, rules, tracing
from tests import grammar
from tests.grammar_blocks import Block


@contextlib.contextmanager
def told(model, number):
    """Print the network that a failure is about."""
    try:
        yield
    except BaseException:
        print(f"random_network({number}):\n{model}")
        raise


def random_keep(channels, share):
    """A random keep mask that removes no pinned set and empties no layer; share 0: one set per layer."""
    scores = torch.rand(len(channels.sets))
    return channels.guarded(channels.set_scores(scores)) | (torch.rand(len(channels.pinned)) < share)


def results(model, inputs):
    with torch.no_grad():
        return tree_flatten(model(*inputs))


def assert_same(small, twin, inputs):
    """In float64 up to the rounding of sums in another order, on the scale of what the network gives."""
    (actual, kind), (expected, kind_of_twin) = results(small, inputs), results(twin, inputs)
    assert kind == kind_of_twin
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == torch.float64
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)


def check_cut(model, inputs, channels, keep):
    """pack equals mask, and costs what the trace says; the packed network and its own trace."""
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    assert_same(small, twin, inputs)
    cost, again = channels.cost(keep), paamops.trace(small, inputs)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert cost[:3] == again.cost()[:3]
    return small, again


def check_flops(model, inputs, channels):
    """As torch counts them; fused attention, of which it has no formula on a CPU, is run as its products."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert channels.cost().flops == counter.get_total_flops() // len(inputs[0])


def check_select(model, inputs, channels, name, share):
    """Within the budget, or told the smallest network there is, which can be had."""
    scores = paamops.score(model, channels, inputs)
    assert (scores >= 0).all()
    try:
        selection = paamops.select(channels, scores, **{name: share})
    except ValueError as error:
        smallest = int(re.search(r"reached has ([\d,]+)", str(error)).group(1).replace(",", ""))
        selection = paamops.select(channels, scores, **{name: smallest})
        assert getattr(selection.achieved, name) == smallest
    assert selection.asked[name] >= getattr(selection.achieved, name)
    assert selection.achieved == channels.cost(selection.keep)
    assert selection.keep[channels.pinned].all()
    return selection.keep


# Where an axis of channels is cut by a view, and one channel is left in each part, the shape no longer tells which of
# the parts is the one that shrinks: a network packed before may be refused then.
CUT_BY_VIEW = {"channel shuffle", "chunk", "groups reduced", "written"}


def check_refusals(model, inputs, error, share):
    """A network that `pack` refuses is packed once what the refusal names is pinned, however often it takes."""
    pinned = ()
    for _ in range(10):
        names = re.search(r"pinned=\((.*)\)", str(error))
        assert names, error
        more = {name for name in re.findall(r"'([^']+)'", names.group(1)) if name not in pinned}
        assert more, error
        pinned = (*pinned, *more)
        channels = paamops.trace(model, inputs, pinned=pinned)
        try:
            check_cut(model, inputs, channels, random_keep(channels, share))
            return
        except paamops.PackingError as again:
            error = again
    raise error


def check_network(number, written=False):
    """Everything that must hold of one network; what is kept, and by whom it is chosen, goes by its number."""
    model, inputs = grammar.random_network(number, written)
    found = grammar.features(model)
    with told(model, number), torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        channels = paamops.trace(model, inputs)
        check_flops(model, inputs, channels)
        if channels.pinned.all():
            return
        share = [0.0, 0.3, 0.7, 0.9][number // 2 % 4]
        name, budget = ["params", "flops", "filters"][number % 3], float(torch.rand(()) * 0.7 + 0.2)
        by_score = check_select(model, inputs, channels, name, budget)
        keep = by_score if number % 2 else random_keep(channels, share)
        try:
            small, again = check_cut(model, inputs, channels, keep)
        except paamops.PackingError as error:
            if "written" not in found:
                raise
            check_refusals(model, inputs, error, share)
            return
        check_flops(small, inputs, again)
        if number % 4 in (0, 1) and not again.pinned.all():
            try:
                check_cut(small, inputs, again, random_keep(again, 0.5))
            except paamops.PackingError as error:
                if not CUT_BY_VIEW & found.keys():
                    raise
                check_refusals(small, inputs, error, 0.5)


@pytest.mark.parametrize("part", range(10))
def test_pack_equals_mask(seed, part):
    check_networks(random.Random(seed * 10 + part).sample(range(2**31), 10))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_pack_equals_mask_often(seed, part):
    for number in random.Random(-seed * 20 - part - 1).sample(range(2**31), 110):
        check_network(number, written=number % 8 == 0)


def test_written_sizes_are_refused_with_advice_that_helps(seed):
    for number in random.Random(seed).sample(range(2**31), 8):
        check_network(number, written=True)


# Of the filters that lie in blocks with a feature, the share that is free to go, at least. What is left is pinned for a
# reason: norms over the channels, outputs, computed weights, products of activations, channels picked by number.
FREE = {
    "1-d convolution": 0.65, "2-d convolution": 0.65, "3-d convolution": 0.7, "PReLU": 0.7,
    "PReLU of each channel": 0.7, "adaptive pooling": 0.5, "attention": 0.05, "attention: by hand": 0.15,
    "attention: encoder layer": 0, "attention: fused": 0.15, "attention: module": 0, "batch norm": 0.85,
    "broadcast product": 0.9, "by hand": 0.75, "channel shuffle": 0.55, "chunk": 0.7,
    "chunk into unequal pieces": 0.1, "concatenation": 0.45, "convolution over channels": 0, "crop": 0.9,
    "depthwise convolution × 1": 0.65, "depthwise convolution × 2": 0.85, "depthwise convolution × 3": 0.65,
    "depthwise doubling transposed convolution": 0.8, "depthwise transposed convolution": 0.7, "dropout": 0.7,
    "flatten into linear": 0.5, "flattened map": 0.5, "gated linear unit": 0.85, "global pooling": 0.45,
    "group norm": 0.05, "group norm of each channel": 0.8, "grouped convolution": 0.8,
    "grouped transposed convolution": 0.75, "groups reduced": 0.9, "in place": 0.65, "instance norm": 0.85,
    "layer norm": 0, "linear over a map": 0.9, "nested concatenation": 0.85, "orthogonal": 0.4,
    "padded shortcut": 0.35, "padding": 0.7, "parametrised weight": 0.45, "pixel shuffle": 0.55,
    "pixel unshuffle": 0.9, "pooling": 0.9, "repeat": 0.9, "repeated module": 0.7, "residual": 0.55,
    "residual with projection": 0.55, "rms norm": 0, "several sums on one stream": 0.5, "shared weight": 0.9,
    "softplus of a weight": 0.4, "spatial gate": 0.45, "spectral norm": 0.4, "spectral norm by hook": 0.3,
    "split at fixed places": 0.2, "squeeze and excitation": 0.85, "stack": 0.9, "strided convolution": 0.85,
    "tanh of a bias": 0.9, "tanh of a weight": 0.3, "transposed convolution": 0.75, "upsampling": 0.85,
    "weight computed in the forward pass": 0.3, "weight norm": 0.4, "written": 0.45,
}  # fmt: skip
COUNTED = {
    "two inputs", "outputs: tuple", "outputs: dict", "outputs: nested", "input joined again",
    "map as output",
}  # fmt: skip


@functools.cache
def survey():
    """Over fixed networks: how many have a feature, and the share of free filters in the blocks that do."""
    networks, free, whole, perceptrons = Counter(), Counter(), Counter(), []
    for number in range(240):
        model, inputs = grammar.random_network(number)
        networks.update(grammar.features(model).keys())
        channels = paamops.trace(model, inputs)
        blocks = [(name, module.features) for name, module in model.named_modules() if isinstance(module, Block)]
        is_free = ~channels.pinned[channels.sets]
        for k, layer in enumerate(channels.layers):
            mine = is_free[channels.offsets[k] : channels.offsets[k + 1]]
            for feature in {f for name, features in blocks if layer.weight.startswith(f"{name}.") for f in features}:
                free[feature] += int(mine.sum())
                whole[feature] += len(mine)
            if layer.name.endswith(("mlp.0", "attend.linear1")):
                perceptrons.append(bool(mine.all()))
    return networks, {feature: free[feature] / whole[feature] for feature in whole}, perceptrons


def test_the_grammar_reaches_every_feature():
    networks, _, _ = survey()
    assert {feature for feature in FREE.keys() | COUNTED if networks[feature] < 3} == set()
    assert networks.keys() - FREE.keys() - COUNTED - {"one input", "outputs: one", "branch"} == set()


def test_channels_that_are_free_to_go_are_free():
    _, shares, perceptrons = survey()
    assert {feature: shares[feature] for feature, least in FREE.items() if shares[feature] < least} == {}
    assert len(perceptrons) > 20
    assert all(perceptrons)


def test_a_number_is_a_network():
    number = int(torch.randint(2**31, ()))
    state = torch.get_rng_state()
    (one, inputs), (other, same_inputs) = grammar.random_network(number), grammar.random_network(number)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(one) == str(other)
    assert len({str(grammar.random_network(other)[0]) for other in range(20)}) == 20
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert_same(one, other, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, same_inputs, strict=True))


def test_what_is_removed_is_felt():
    """Networks in which a removed channel changed nothing could not tell a right cut from a wrong one."""
    felt = []
    for number in range(40):
        model, inputs = grammar.random_network(number)
        channels = paamops.trace(model, inputs)
        for s in (~channels.pinned).nonzero().flatten()[:3].tolist():
            keep = torch.arange(len(channels.pinned)) != s
            before, after = results(model, inputs)[0], results(paamops.mask(model, channels, keep), inputs)[0]
            felt.append(max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) > 1e-6)
    assert sum(felt) > 0.9 * len(felt)


def wrong_indices(right):
    def kept_indices(channels, keep):
        """The last layer's input is cut one place further on, and everything fits."""
        indices = right(channels, keep)
        for layer in reversed(channels.layers):
            for axis in channels.read_axes[layer.weight]:
                index = indices[layer.weight][axis]
                if index is not None:
                    indices[layer.weight][axis] = (index + 1) % len(channels.axes[layer.weight][axis])
                    return indices
        return indices

    return kept_indices


WRONG = {
    "indices": lambda patch: patch.setattr(packing, "kept_indices", wrong_indices(packing.kept_indices)),
    "sums": lambda patch: patch.setattr(rules, "pointwise", rules.same),
    "concatenation": lambda patch: patch.setitem(rules.RULES, "cat", forgetful),
    "views": lambda patch: patch.setitem(rules.RULES, "view", forgetful),
    "groups": lambda patch: patch.setitem(rules.RULES, "native_group_norm", rules.batch_norm),
    "softmax": lambda patch: patch.setattr(tracing.Tracer, "pin_tensor", tracing.Tracer.close),
}


def forgetful(tracer, op, args, kwargs, out):
    """A rule that lets what it is given pass unseen."""


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("verified", [True, False])
def test_wrong_cuts_are_found(monkeypatch, wrong, verified):
    """With a mistake in trace or pack, some network of the first few fails, whether or not `pack` looks itself."""
    monkeypatch.setattr(rules, "find", rules.find.__wrapped__)  # it remembers the rule of an op
    wrong(monkeypatch)
    if not verified:
        monkeypatch.setattr(packing, "verify", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        check_networks(range(60))


def check_networks(numbers):
    for number in numbers:
        check_network(number)
