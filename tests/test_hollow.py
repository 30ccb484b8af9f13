"""Runs without values: the same trace as with them, the same shapes as the kernels give, nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import paamops
from paamops import hollow, tracing
from tests import architectures, networks


def with_values(monkeypatch, model, inputs):
    with monkeypatch.context() as patch:
        patch.setattr(hollow, "can_stand_for", lambda *_: False)
        return paamops.trace(model, inputs)


def check_same(one, other):
    assert torch.equal(one.sets, other.sets)
    assert one.reasons == other.reasons
    assert one.layers
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    assert [layer.output_size for layer in one.layers] == [layer.output_size for layer in other.layers]
    assert (one.places, one.op_counts, one.scalars) == (other.places, other.op_counts, other.scalars)
    assert torch.equal(one.score_source, other.score_source)
    assert one.cost() == other.cost()
    for name, axes in one.components.items():
        for mine, theirs in zip(axes, other.components[name], strict=True):
            assert (mine == theirs).all()


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_a_trace_without_values_is_the_same(network, monkeypatch):
    model, inputs = networks.make(network)
    check_same(paamops.trace(model, inputs), with_values(monkeypatch, model, inputs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["mobilenetv3-small", "regnety-400mf", "shufflenetv2", "unet", "yolo", "vit-tiny"])
def test_a_trace_of_an_architecture_is_the_same(name, memory_format, monkeypatch):
    model, inputs = architectures.build(name, dtype=torch.float32)
    model, inputs = model.to(memory_format=memory_format), (inputs[0].contiguous(memory_format=memory_format),)
    check_same(paamops.trace(model, inputs), with_values(monkeypatch, model, inputs))


def test_usual_networks_run_without_values(monkeypatch):
    """Otherwise the tests above compare a run with itself."""
    monkeypatch.setattr(tracing, "run_with_values", None)
    for name in ("resnet50", "densenet121", "mobilenetv3-small", "efficientnet-b0", "regnety-400mf", "unet"):
        model = architectures.ARCHITECTURES[name].make()
        paamops.trace(model, torch.randn(2, 3, 32, 32))


CALLS = {
    "relu": lambda x, y: F.relu(x),
    "hardtanh": lambda x, y: F.relu6(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x, y: F.leaky_relu(x, 0.1),
    "elu": lambda x, y: F.elu(x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "add": lambda x, y: x + y,
    "add half": lambda x, y: torch.add(x, y, alpha=2),
    "sub broadcast": lambda x, y: x - y[:1],
    "mul number": lambda x, y: 2 * x,
    "mul promoted": lambda x, y: x * y.double(),
    "div": lambda x, y: x / y,
    "cat": lambda x, y: torch.cat([x, y, x], 1),
    "cat rows": lambda x, y: torch.cat([x, y], -2),
    "cat promoted": lambda x, y: torch.cat([x, y.double()], 0),
    "cat empty": lambda x, y: torch.cat([x.new_empty(0), x], 1),
    "norm": lambda x, y: F.batch_norm(x, y[0, :, 0, 0], y[0, :, 0, 0].abs()),
    "norm affine": lambda x, y: F.batch_norm(x, y[0, :, 0, 0], y[0, :, 0, 0].abs(), y[0, :, 0, 0], y[0, :, 0, 0]),
    "instance norm": lambda x, y: F.instance_norm(x),
    "convolution": lambda x, y: F.conv2d(x, y[:, :, :2, :3], None, (2, 1), (1, 2)),
    "depthwise": lambda x, y: F.conv2d(x, y[0, :, None, :2, :2], dilation=2, groups=x.size(1), padding="same"),
    "transposed": lambda x, y: F.conv_transpose2d(
        x, y[0, :, None, :2, :2].expand(-1, 4, -1, -1).contiguous(), stride=3, padding=1, output_padding=(1, 2)
    ),
    "one dimension": lambda x, y: F.conv1d(x[:, :, 0], y[0, 0, :1, :2].expand(5, x.size(1), 2).contiguous(), stride=2),
    "three dimensions": lambda x, y: F.conv3d(x[:, None], y[0, :1, None, None, :2, :2].contiguous(), padding=1),
    "linear": lambda x, y: F.linear(x[0, 0], y[0, 0], y[0, 0, :, 0]),
}  # fmt: skip


# Of these RESULTS leaves some, or all, to the op: what broadcasts, promotes or is not contiguous.
SILENT = (
    "sub broadcast", "mul number", "mul promoted", "cat promoted", "cat empty", "instance norm", "convolution",
    "depthwise",
)  # fmt: skip


class Compared(TorchDispatchMode):
    """Runs every op, and holds what RESULTS says of it against what it gave; `count`: how often it said something."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op in hollow.RESULTS:
            shapes = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs or {}))
            said = hollow.RESULTS[op](*shapes[0], **shapes[1])
            if said is not None:
                pairs = zip(tracing.leaves(said), tracing.leaves(out), strict=True)
                for mine, theirs in pairs if isinstance(out, torch.Tensor) else list(pairs)[:1]:
                    self.count += 1
                    assert mine.is_meta
                    assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_results_have_the_layout_that_the_kernels_give(call, memory_format):
    sizes = [int(n) for n in torch.randint(3, 7, (4,))]
    x, y = (torch.randn(sizes).contiguous(memory_format=memory_format) for _ in range(2))
    with torch.no_grad(), Compared() as compared:
        call(x, y)
    spoke = memory_format == torch.contiguous_format and call not in [CALLS[name] for name in SILENT]
    assert compared.count >= spoke


def test_wrong_sizes_are_the_ops_to_refuse():
    convolution = torch.ops.aten.convolution.default
    x, weight = torch.empty(1, 4, 5, 5, device="meta"), torch.empty(6, 3, 3, 3, device="meta")
    with pytest.raises(RuntimeError, match="channel"):
        hollow.result(convolution, [x, weight], (x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {})


class Keeper(nn.Module):
    """It keeps what it has computed, in an attribute, a dict, a list, and in a tensor that it made the first time."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.last, self.by_name, self.all = None, {"x": torch.ones(1)}, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if not hasattr(self, "ramp"):
            self.ramp = x[0, 0, 0] + 0.5
        self.last = self.by_name["y"] = F.relu(self.a(x * self.ramp))
        self.all.append(self.last)
        self.count += 1
        return self.b(self.last)


def test_nothing_without_values_is_left_behind():
    model, x = Keeper().eval(), torch.randn(2, 3, 8, 8)
    channels = paamops.trace(model, x)
    assert model.last is None
    assert model.by_name == {"x": torch.ones(1)}
    assert model.all == []
    assert not hasattr(model, "ramp")
    assert model.count == 0
    keep = channels.pinned | (torch.arange(len(channels.pinned)) % 2 == 0)
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    torch.testing.assert_close(small(x), twin(x))
    assert not any(t.is_meta for t in (small.ramp, small.last, *small.all, *small.by_name.values()))


class Tokens(nn.Module):
    """Linear layers over the positions of a map: what they run as follows from its memory format."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)).permute(0, 2, 3, 1))).mean((1, 2)))


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_model", [False, True])
def test_memory_formats_are_those_of_the_cpu(of_input, of_model):
    model, x = Tokens().eval(), torch.randn(2, 3, 8, 8)
    x = x.to(memory_format=torch.channels_last) if of_input else x
    model = model.to(memory_format=torch.channels_last) if of_model else model
    channels = paamops.trace(model, x)
    assert len(paamops.score(model, channels, x)) == 18  # it finds the activations where the trace has seen them


SEEN = {}


class Elsewhere(nn.Module):
    """It keeps what it has computed where nobody looks: deep within an attribute, and outside of the model."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.cache = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), {"of": {}}

    def forward(self, x):
        if "grid" not in self.cache["of"]:
            self.cache["of"]["grid"] = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device)
        SEEN["last"] = F.relu(self.a(x * self.cache["of"]["grid"]))
        return self.b(SEEN["last"])


def test_what_cannot_be_put_back_has_values():
    model, x = Elsewhere().eval(), torch.randn(2, 3, 8, 8)
    hooked, found = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), []
    hooked[1].register_forward_hook(lambda module, args, output: found.append(output))
    paamops.trace(model, x)
    paamops.trace(hooked, x)
    assert not any(tensor.is_meta for tensor in (SEEN.pop("last"), model.cache["of"]["grid"], *found))
    model(x)


class Reads(nn.Module):
    """What it computes decides where it goes on."""

    def __init__(self, swallow):
        super().__init__()
        self.a, self.b, self.swallow = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), swallow

    def forward(self, x):
        y = F.relu(self.a(x))
        try:
            scale = 1.0 if y.max().item() >= 0 else 2.0
        except RuntimeError:
            if not self.swallow:
                raise
            scale = 3.0
        return self.b(y * scale)


@pytest.mark.parametrize("swallow", [False, True])
def test_a_forward_that_reads_values_runs_with_them(swallow):
    channels = paamops.trace(Reads(swallow).eval(), torch.randn(2, 3, 8, 8))
    assert ("aten.mul.Tensor", [1.0]) in channels.scalars


def test_constants_that_are_no_buffers_are_met_with_values():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.shift = torch.randn(1, 8, 1, 1)

        def forward(self, x):
            return self.b(F.relu(self.a(x) + self.shift))

    channels = paamops.trace(Shifted().eval(), torch.randn(2, 3, 8, 8))
    assert channels.pinned[:8].all()
    assert "fixed size" in channels.reasons[0]


def test_an_error_of_the_forward_is_the_one_with_values():
    with pytest.raises(ValueError, match=r"fails on example_inputs, in aten.convolution"):
        paamops.trace(Keeper(), torch.randn(2, 5, 8, 8))


class Chain(nn.Module):
    def __init__(self, depth, width=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) for _ in range(depth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x)) + x
        return x.mean((2, 3))


def test_the_work_grows_with_the_depth_and_no_faster():
    """Ops looked at and labels joined, for 10, 40 and 160 layers: as many more each time."""
    ops, edges = [], []
    for depth in (10, 40, 160):
        model = Chain(depth).eval()
        tensors = tracing.named_tensors(model)
        vectors = {name: [torch.arange(size) for size in tensor.shape] for name, tensor in tensors.items()}
        tracer = tracing.run_without_values(model, tensors, vectors, torch.randn(1, 4, 2, 2), tracing.Tracer)
        ops.append(sum(tracer.counts.values()))
        edges.append(sum(len(a) for a, _, _ in tracer.edges))
    assert ops[2] - ops[1] == 4 * (ops[1] - ops[0]) > 0
    assert edges[2] - edges[1] == 4 * (edges[1] - edges[0]) > 0
