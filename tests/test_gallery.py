"""The gallery: small networks of torchvision and timm train as masked dense does; its page shows its results."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks import gallery, gallery_report, readme
from benchmarks.gallery_networks import ARCHITECTURES
from benchmarks.gallery_steps import (
    TOLERANCE,
    agreement,
    batches,
    compare,
    converted,
    dense_steps,
    network,
    our_steps,
    trained_outside,
)
from benchmarks.masked import trained_masks

# By default one axis of the quickest ones of seven kinds; everything else takes minutes.
QUICK = {
    "torchvision:densenet": "out",
    "torchvision:regnet_x": "in",
    "torchvision:swin_v2": "out",
    "torchvision:vit": "in",
    "timm:resnetv2_50": "out",
    "timm:gmlp": "in",
    "timm:cait_xxs24": "out",
}
CASES = [
    pytest.param(name, axis, marks=[] if QUICK.get(name) == axis else [pytest.mark.long])
    for name in ARCHITECTURES
    for axis in gallery_report.AXES
]
RECORD: dict[str, Any] = json.loads((readme.RESULTS / "gallery.json").read_text())


@pytest.mark.parametrize(("name", "axis"), CASES)
def test_two_steps_equal_masked_dense(name: str, axis: str) -> None:
    """In fp64 to six digits of the update, in fp32 as far as PyTorch in fp32; all else keeps its bits."""
    for dtype, found in agreement(name, axis).items():
        assert not found.moved, f"{dtype}: {found.moved} moved, but nothing there was selected"
        assert found.equal, f"{dtype}: error {found.error:.1e} over {found.limit:.1e} in {found.where}"
        assert found.parameters > 4


class Control:
    """One network with masked dense training of a selection, beside which other selections are held."""

    def __init__(self) -> None:
        self.plain, self.data = network("timm:vit_tiny"), batches("timm:vit_tiny")
        _, report, self.selection = converted(self.plain, "out")
        whole = trained_outside(self.plain, report)
        self.masks: Mapping[str, Tensor] = trained_masks(self.plain, self.selection, whole)
        self.dense = dense_steps(self.plain, self.masks, self.data)

    def beside(self, selection: Any, steps: int = 2) -> Any:
        ours = our_steps(self.plain, sb.Selection(dict(selection)), self.data[:steps])
        return compare(ours, self.dense, self.plain.state_dict(), self.masks)

    def largest(self) -> tuple[str, list[int]]:
        """The layer with most selected channels, and them."""
        chosen = {name: channels.index.tolist() for name, channels in self.selection.items()}
        name = max(chosen, key=lambda name: len(chosen[name]))
        return name, chosen[name]


def test_what_is_wrong_is_seen() -> None:
    """A wrong channel, a missing one, a missing layer and a missing step are far outside of the wider tolerance."""
    control, limit = Control(), TOLERANCE[torch.float32]
    name, index = control.largest()
    assert control.beside(control.selection).error <= TOLERANCE[torch.float64]
    count = control.plain.get_submodule(name).weight.shape[0]  # type: ignore[union-attr, index]
    other = next(i for i in range(count) if i not in index)

    def instead(channels: list[int]) -> dict[str, Any]:
        return {**control.selection, name: sb.Channels(sorted(channels))}

    wrong = control.beside(instead([*index[1:], other]))
    assert f"{name}.weight" in wrong.moved and wrong.error > limit
    missing = control.beside(instead(index[1:]))
    assert not missing.moved and missing.where.startswith(name) and missing.error > limit
    layer = control.beside({key: value for key, value in control.selection.items() if key != name})
    assert layer.where.startswith(name) and layer.error == pytest.approx(1, abs=1e-6)
    assert control.beside(control.selection, steps=1).error > limit


def test_a_network_that_is_not_restored_is_refused() -> None:
    state = nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match="compare restored networks"):
        compare({"weight": state["weight"]}, state, state, {})


def test_what_is_left_dense() -> None:
    """Of a sigmoid between two convolutions: its output, which the second convolution keeps too; the image is ours."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    images = torch.randn(2, 3, 5, 5)
    assert gallery.left_dense(plain, images) == {"Sigmoid has no lean version": 2 * 4 * 5 * 5 * 4}
    assert sb.memory.saved_bytes(lambda: plain(images)) == 2 * (3 + 4) * 5 * 5 * 4


def test_kinds_name_the_class() -> None:
    reasons = {row_reason for row in RECORD["networks"] for row_reason in row["left"]}
    unknown = [reason for reason in reasons if not gallery_report.kind_of(reason)[1]]
    assert not unknown, unknown


def test_the_gallery_is_large_and_measured() -> None:
    names = [row["network"] for row in RECORD["networks"]]
    assert names == list(ARCHITECTURES)
    for library in ("torchvision", "timm"):
        assert sum(each.library == library for each in ARCHITECTURES.values()) >= 20
    for row in RECORD["networks"]:
        assert 0 <= row["lean"] <= 1
        assert sum(row["left"].values()) == pytest.approx(row["dense"] * (1 - row["lean"]))
        for axis, found in row["agreement"].items():
            assert all(value["equal"] for value in found.values()), (row["network"], axis, found)


def test_pages_are_those_of_the_results() -> None:
    assert (readme.RESULTS / "gallery.md").read_text() == gallery_report.page(RECORD), "run `make results`"
    text = (readme.ROOT / "docs" / "gallery.md").read_text()
    assert readme.filled(text) == text, "run `make results`"
    assert all(f"| {name} |" in text for name in ARCHITECTURES)
