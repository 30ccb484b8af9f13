"""The law on networks nobody thought of: whatever trace makes of them, pack equals mask and the cost is exact.

A failing test prints the seed of its network and its structure: `random_network(seed)` makes it again.
"""

import contextlib
import random
import re
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import paamops
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


def check_select(channels, name, share):
    """Within the budget, or told the smallest network there is, which can be had."""
    scores = torch.rand(len(channels.sets))
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


# Where an axis of channels is cut by a view, and one channel is left in each part, the shape no longer tells which of the
# parts is the one that shrinks: a network packed before may be refused then.
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
        by_score = check_select(channels, name, budget)
        keep = by_score if number % 2 else random_keep(channels, share)
        try:
            small, again = check_cut(model, inputs, channels, keep)
        except paamops.PackingError as error:
            assert "written" in found, error
            check_refusals(model, inputs, error, share)
            return
        check_flops(small, inputs, again)
        if number % 4 in (0, 1) and not again.pinned.all():
            try:
                check_cut(small, inputs, again, random_keep(again, 0.5))
            except paamops.PackingError as error:
                assert CUT_BY_VIEW & found.keys(), error
                check_refusals(small, inputs, error, 0.5)


@pytest.mark.parametrize("part", range(10))
def test_pack_equals_mask(seed, part):
    for number in random.Random(seed * 10 + part).sample(range(2**31), 10):
        check_network(number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_pack_equals_mask_often(seed, part):
    for number in random.Random(-seed * 20 - part - 1).sample(range(2**31), 110):
        check_network(number, written=number % 8 == 0)


def test_written_sizes_are_refused_with_advice_that_helps(seed):
    for number in random.Random(seed).sample(range(2**31), 8):
        check_network(number, written=True)
