"""A restored network leaves PyTorch by its own doors, with the values of the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import sparse_bwd as sb


def trained(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A restored network after three steps on a fifth of its channels, images, and its outputs while converted."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=5)
    images = torch.randn(4, 3, 64, 64)
    sb.convert(model)
    sb.RandomPolicy(model, sb.Budget(fraction=0.2)).step()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.01)
    for _ in range(3):
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs = model.eval()(images)
    return sb.restore(model), images, outputs


def test_torch_export_equals_the_trained_network(tmp_path: Path) -> None:
    model, images, outputs = trained("mobilenet_v2")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(again(images), outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(images[:3]), outputs[:3], rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    assert set(program.state_dict) <= set(state)
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict.items())


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("resnet18", marks=pytest.mark.long)])
def test_onnx_equals_the_trained_network(tmp_path: Path, name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images, outputs = trained(name)
    torch.onnx.export(
        model, (images,), tmp_path / "model.onnx", dynamo=True, external_data=False, verbose=False
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs, rtol=1e-3, atol=1e-4)
