"""What must hold of a pruner, each as an experiment that runs on paamops and on torch-pruning alike.

`ROWS`: title -> experiment(prune), where `prune` is OURS or THEIRS; it returns (whether it holds, what was seen). An
error is seen too, and does not hold. "Dead" filters have zero weights, and so do the layers' weights that read them:
a pruner that removes them, and only them, leaves what the network computes.
"""

import contextlib
import inspect
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import paamops
from paamops import packing, tracing
from paamops.labels import ByTensor
from tests.architectures import Basic, head, unit


def l2(model, channels):
    """The l2 norm of every filter, (F,)."""
    if hasattr(paamops, "weight_scores"):
        return paamops.weight_scores(model, channels, "l2")
    parameters = dict(model.named_parameters())
    rows = [parameters[layer.weight].detach().movedim(layer.axis, 0).flatten(1) for layer in channels.layers]
    return torch.cat([torch.linalg.vector_norm(each, dim=1) for each in rows])


def ours(model, x, optimizer=None, ratio=None, global_pruning=None, **budget):
    """The packed network, and what was asked and achieved as the pruner tells. It takes budgets, no `ratio`."""
    channels = paamops.trace(model, x)
    selection = paamops.select(channels, l2(model, channels), **budget)
    small = paamops.pack(model, channels, selection, **({} if optimizer is None else {"optimizer": optimizer}))
    return small, f"{selection.asked}, {selection.achieved}"


def theirs(model, x, optimizer=None, round_to=None, ratio=0.5, global_pruning=False, **_):
    """The same by torch-pruning's high-level pruner, as its README has it; its network is the one that was given.

    It takes no budget but the `ratio` of channels that go.
    """
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=global_pruning,
        ignored_layers=[[m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]],
        round_to=round_to,
    )
    pruner.step()
    return model, None


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + F.relu(self.norm2(self.conv2(x)))
        return self.last(F.relu(self.conv3(x)).mean((2, 3)))


X = torch.Size((2, 3, 8, 8))


def optimizer_goes_on(prune):
    """One step of the optimizer that was there before moves every parameter of the pruned network."""
    model, x = Small(), torch.randn(X)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(network):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()

    step(model)
    small, _ = prune(model.eval(), x, optimizer=optimizer, params=0.5)
    before = [p.detach().clone() for p in small.parameters()]
    step(small.train())
    moved = sum(not torch.equal(p, old) for p, old in zip(small.parameters(), before, strict=True))
    return moved == len(before), f"{moved} of {len(before)} parameters move"


def kept_requires_grad(prune):
    model = Small().eval()
    model.conv1.weight.requires_grad_(False)
    model.norm2.bias.requires_grad_(False)
    small, _ = prune(model, torch.randn(X), params=0.5)
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    return frozen == ["conv1.weight", "norm2.bias"], f"frozen after: {', '.join(frozen) or 'none'}, of two before"


def kept_modes(prune):
    model = Small().train()
    model.norm1.eval()
    before = [m.training for m in model.modules()]
    small, _ = prune(model, torch.randn(X), params=0.5)
    after = [m.training for m in small.modules()]
    return before == after, f"{sum(before)} modules in train mode before, {sum(after)} after"


def kept_memory_format(prune):
    model = Small().eval().to(memory_format=torch.channels_last)
    small, _ = prune(model, torch.randn(X).contiguous(memory_format=torch.channels_last), params=0.5)
    convs = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d)]
    count = sum(w.is_contiguous(memory_format=torch.channels_last) for w in convs)
    return count == len(convs), f"{count} of {len(convs)} weights are channels_last after"


def kept_dtype(prune):
    small, _ = prune(Small().eval().bfloat16(), torch.randn(X).bfloat16(), params=0.5)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in small.parameters()})
    return dtypes == ["bfloat16"], f"{', '.join(dtypes)} after bfloat16"


def kept_hooks(prune):
    model, x, calls = Small().eval(), torch.randn(X), []
    model.conv1.register_forward_hook(lambda *_: calls.append("forward"))
    model.conv2.register_full_backward_hook(lambda *_: calls.append("backward"))
    small, _ = prune(model, x, params=0.5)
    calls.clear()
    small(x).sum().backward()
    return sorted(calls) == ["backward", "forward"], f"run after: {', '.join(calls) or 'none'}"


def kept_parameter_hooks(prune):
    """One that runs when a parameter's gradient is there."""
    model, x, calls = Small().eval(), torch.randn(X), []
    model.conv2.weight.register_hook(lambda grad: calls.append("gradient"))
    small, _ = prune(model, x, params=0.5)
    calls.clear()
    small(x).sum().backward()
    return calls == ["gradient"], f"run after: {', '.join(calls) or 'none'}"


def smaller(model, count):
    after = sum(p.numel() for p in model.parameters())
    return after < count, f"{count:,} parameters before, {after:,} after"


def frozen_is_not_silent(prune):
    """A network all of whose parameters are frozen is pruned, or refused."""
    model = Small().eval().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    try:
        small, _ = prune(model, torch.randn(X), params=0.5)
    except Exception as error:
        return True, f"refused: {first_line(error)}"
    return smaller(small, count)


def unprunable_is_not_silent(prune):
    """One layer, which makes the output: nothing can go."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    try:
        prune(model, torch.randn(X), params=0.5)
    except Exception as error:
        return True, f"refused: {first_line(error)}"
    return False, "no error, and nothing pruned"


def unchanged(prune, model, x):
    """Half of each layer's filters are dead: they go, and what the network computes stays."""
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        expected, count = model(x), sum(p.numel() for p in model.parameters())
    small, _ = prune(model, x, threshold=0.0, ratio=0.5)
    less, told = smaller(small, count)
    with torch.no_grad():
        error = float((small(x) - expected).abs().max())
    return less and error < 1e-9, f"{told}; outputs differ by {error:.1g}"


def kill(weight, rows):
    with torch.no_grad():
        weight[rows] = 0


def multiplied_depthwise(prune):
    """groups = in, out = 2 · in: two filters for every channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8, bias=False), nn.ReLU(),
        nn.Conv2d(16, 4, 3),
    )  # fmt: skip
    kill(model[0].weight, torch.arange(0, 8, 2))
    kill(model[2].weight, torch.tensor([k for c in range(0, 8, 2) for k in (2 * c, 2 * c + 1)]))
    return unchanged(prune, model, torch.randn(X))


def pixel_shuffle(prune):
    """r² = 4 filters make a channel of the shuffled map."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )  # fmt: skip
    kill(model[0].weight, torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))
    kill(model[3].weight, torch.arange(0, 8, 2))
    return unchanged(prune, model, torch.randn(X))


def equal_scores(prune):
    """Of each layer's 32 filters 24 are equal, the others better; half are to go, ranked over all layers."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
            if p.dim() > 1:
                p[24:] = 1
    # The output's four filters stay, and count for paamops: 32 of the 64 others, and these.
    small, _ = prune(model, torch.randn(X), filters=36, ratio=0.5, global_pruning=True)
    left = small[0].out_channels + small[2].out_channels
    return left == 32, f"{left} of 64 filters stay, of 32 asked"


def half_of_the_parameters(round_to):
    def experiment(prune):
        """Within what one filter more (of the costliest set) would cost; with round_to, one step of it."""
        layers = [Basic(a, b, s) for a, b, s in ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))]
        model, x = nn.Sequential(unit(3, 16, 3), *layers, head(64)).eval(), torch.randn(1, 3, 32, 32)
        channels = paamops.trace(model, x)
        whole = channels.cost().params
        rounded = 1 if round_to is None else round_to
        most = most_of_a_set(channels) * rounded
        # For half of the parameters torch-pruning's README has a ratio of 0.30, of channels.
        rounding = {} if prune is ours and round_to is None else {"round_to": round_to}
        small, told = prune(model, x, params=0.5, ratio=0.3, **rounding)
        count = sum(p.numel() for p in small.parameters())
        said = "asked and achieved reported" if told else "what was achieved is not reported"
        holds = abs(count - whole / 2) <= most and told is not None
        return (
            holds,
            f"{100 * count / whole:.2f} % of the parameters stay, within {100 * most / whole:.2f} asked; {said}",
        )

    return experiment


def most_of_a_set(channels):
    """The parameters that the costliest single channel set takes with it."""
    whole, most = channels.cost().params, 0
    for s in (~channels.pinned).nonzero().flatten().tolist():
        keep = torch.ones_like(channels.pinned)
        keep[s] = False
        most = max(most, whole - channels.cost(keep).params)
    return most


def no_shared_state(prune):
    """What a call leaves in the default arguments of the functions that it went through."""
    if prune is ours:
        functions = [paamops.trace, paamops.select, paamops.pack, paamops.mask]
    else:
        import torch_pruning as tp

        functions = [tp.pruner.BasePruner.__init__, tp.DependencyGraph.build_dependency]

    def held():
        values = [p.default for f in functions for p in inspect.signature(inspect.unwrap(f)).parameters.values()]
        return [len(value) for value in values if isinstance(value, (dict, list, set))]

    before = held()
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    prune(model.eval(), torch.randn(1, 4, 8, 8), params=0.7)
    left = sum(after - old for after, old in zip(held(), before, strict=True))
    return left == 0, f"{left} entries left in default arguments by one call"


class Reads(TorchDispatchMode):
    """Counts how often values that come from the model's tensors are read back to the host."""

    def __init__(self, model):
        super().__init__()
        self.of_model, self.count = ByTensor(), 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.of_model[tensor] = True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        if any(t in self.of_model for t in tensors):
            self.count += op._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2")
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.of_model[t] = True
        return out

    def __enter__(self):
        self.originals = {name: getattr(torch.Tensor, name) for name in ("cpu", "numpy", "tolist")}
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, self.reading(original))
        return super().__enter__()

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)
        return super().__exit__(*error)

    def reading(self, original):
        def read(tensor, *args, **kwargs):
            if tensor not in self.of_model:
                return original(tensor, *args, **kwargs)
            self.count += 1
            with unpatched(self):
                out = original(tensor, *args, **kwargs)
                return out.clone() if isinstance(out, torch.Tensor) else out  # on the host, it is the device's no more

        return read


@contextlib.contextmanager
def unpatched(reads):
    """Inside, ops are not looked at."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield reads


def no_syncs_per_layer(prune):
    """Reads of what the scores and weights hold, for a network of 4 layers and for one of 16."""
    counts = []
    for depth in (4, 16):
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        model, x = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 4, 1)).eval(), torch.randn(X)
        if prune is ours:
            channels = paamops.trace(model, x)
            with Reads(model) as reads:
                selection = paamops.select(channels, l2(model, channels), params=0.5)
            with Reads(model) as packing:
                packed_tensors(model, channels, selection)
            counts.append(reads.count + packing.count)
        else:
            import torch_pruning as tp

            scorer = tp.importance.GroupMagnitudeImportance(p=2)
            ignored = [model[-1]]
            pruner = tp.pruner.BasePruner(model, x, scorer, pruning_ratio=0.3, ignored_layers=ignored)
            with Reads(model) as reads:
                pruner.step()
            counts.append(reads.count)
    return counts[0] == counts[1], f"{counts[0]} reads at 4 layers, {counts[1]} at 16"


def packed_tensors(model, channels, selection):
    """What pack does with the tensors: their gathering; its check runs on shapes alone."""
    keep = channels.check(selection)
    indices = packing.kept_indices(channels, keep)
    tensors = tracing.named_tensors(model)
    return paamops.pack_channels([t.detach() for t in tensors.values()], [indices[name] for name in tensors])


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:100]


ROWS = {
    "the optimizer keeps training all parameters": optimizer_goes_on,
    "`requires_grad` stays": kept_requires_grad,
    "train or eval mode stays, of every module": kept_modes,
    "channels_last stays": kept_memory_format,
    "the dtype stays": kept_dtype,
    "hooks of modules stay": kept_hooks,
    "hooks of parameters stay": kept_parameter_hooks,
    "a network that is all frozen is pruned or refused": frozen_is_not_silent,
    "a network that cannot be pruned is refused": unprunable_is_not_silent,
    "groups = in, out = 2 · in": multiplied_depthwise,
    "PixelShuffle": pixel_shuffle,
    "equal scores do not overprune: half of the filters go": equal_scores,
    "50 % of the parameters, to a filter": half_of_the_parameters(None),
    "50 % of the parameters, `round_to=8`": half_of_the_parameters(8),
    "calls share no mutable state": no_shared_state,
    "no device sync for each layer": no_syncs_per_layer,
}

PRUNERS = types.MappingProxyType({"paamops": ours, "torch-pruning": theirs})


def run(seed=0):
    """Title -> pruner -> {holds, seen}."""
    results = {}
    for title, experiment in ROWS.items():
        results[title] = {}
        for name, prune in PRUNERS.items():
            torch.manual_seed(seed)
            try:
                holds, seen = experiment(prune)
            except Exception as error:
                holds, seen = False, first_line(error)
            results[title][name] = {"holds": bool(holds), "seen": seen}
    return results
