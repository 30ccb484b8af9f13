"""A packed network is an ordinary one: compilers, exporters, mixed precision and data parallelism take it as it is."""

import copy
import socket

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import paamops
from tests import networks
from tests.test_packing import random_keep
from tests.tolerances import NETWORK_TOLERANCE

NETWORKS = pytest.mark.parametrize(
    "network", [networks.Residual, networks.Dense, networks.Depthwise], ids=lambda network: network.__name__
)


def packed(network, dtype=torch.float32):
    """A packed network, its masked twin and inputs."""
    model, inputs = networks.make(network)
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.4)
    return paamops.pack(model, channels, keep), paamops.mask(model, channels, keep), inputs


@pytest.mark.slow
@NETWORKS
def test_compiled_in_one_graph(network):
    small, twin, inputs = packed(network)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")  # all but the code, which takes a minute
    torch.testing.assert_close(compiled(*inputs), twin(*inputs), **NETWORK_TOLERANCE[torch.float32])
    compiled(*inputs).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.slow
def test_compiled_to_code_in_one_graph():
    small, twin, inputs = packed(networks.Residual)
    with torch.no_grad():
        found = torch.compile(small, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, twin(*inputs), **NETWORK_TOLERANCE[torch.float32])


@NETWORKS
def test_exported(network):
    small, twin, inputs = packed(network, torch.float64)
    exported = torch.export.export(small, inputs).module()
    torch.testing.assert_close(exported(*inputs), twin(*inputs), **NETWORK_TOLERANCE[torch.float64])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@NETWORKS
def test_onnx(network, tmp_path):
    pytest.importorskip("onnxscript", reason="onnx, onnxscript and onnxruntime are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    small, twin, inputs = packed(network)
    torch.onnx.export(small, inputs, dynamo=True, verbose=False).save(tmp_path / "small.onnx")
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), twin(*inputs).detach(), **NETWORK_TOLERANCE[torch.float32])


@NETWORKS
def test_mixed_precision(network):
    small, twin, inputs = packed(network)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = small(*inputs), twin(*inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, **NETWORK_TOLERANCE[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16):
        loss = small.train()(*inputs).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in small.parameters())


@NETWORKS
def test_channels_last_and_copies(network):
    small, twin, inputs = packed(network, torch.float64)
    last, inputs = copy.deepcopy(small).to(memory_format=torch.channels_last), inputs
    x = inputs[0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), twin(*inputs), **NETWORK_TOLERANCE[torch.float64])
    assert last.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert str(paamops.kept(last)) == str(paamops.kept(small))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    torch.testing.assert_close(small(*inputs), twin(*inputs), **NETWORK_TOLERANCE[torch.float64])


def half(rank, port, cases, path):
    """One of two processes, with half of each batch; the first one writes its gradients to a file."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for model, inputs in cases:
        parallel = DistributedDataParallel(model)
        parallel(*(x[rank::2] for x in inputs)).square().mean().backward()
    if rank == 0:
        torch.save([[parameter.grad for parameter in model.parameters()] for model, _ in cases], path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_over_two_processes(tmp_path):
    cases, expected = [], []
    for network in (networks.Residual, networks.Dense, networks.Depthwise):
        small, _, inputs = packed(network, torch.float64)
        small(*inputs).square().mean().backward()
        expected.append([parameter.grad for parameter in small.parameters()])
        small.zero_grad()
        cases.append((small, inputs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(half, (port, cases, tmp_path / "gradients"), 2)
    for one, other in zip(torch.load(tmp_path / "gradients"), expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **NETWORK_TOLERANCE[torch.float64])
