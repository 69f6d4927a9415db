"""`explain` names every storage that `saved_bytes` counts, and says what would free it."""

import json

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.memory import explain, saved_bytes
from sparse_bwd.memory.advice import how_to_free
from tests.networks import tiny_net


def converted(mode: str = "frozen", axis: str = "out") -> nn.Module:
    model = tiny_net()
    sb.convert(model, batch_norm=mode)
    sb.apply(model, share_of_channels(model, 0.5, axis=axis))
    model.get_submodule("drop").p = 0.5  # type: ignore[assignment]
    return model.train()


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("mode", ["frozen", "bias", "train"])
def test_total_is_saved_bytes(mode: str, axis: str) -> None:
    model, x = converted(mode, axis), torch.randn(4, 3, 12, 12)
    explanation = explain(model, x)
    assert explanation.total == saved_bytes(lambda: model(x)) > 0
    assert all(
        row.keepers and len(row.keepers) == len(row.kinds) == len(row.free) for row in explanation.rows
    )
    assert [row.nbytes for row in explanation.rows] == sorted(
        (r.nbytes for r in explanation.rows), reverse=True
    )


def test_total_of_a_plain_network() -> None:
    model, x = tiny_net().eval(), torch.randn(4, 3, 12, 12)
    assert explain(model, x).total == saved_bytes(lambda: model(x))


def test_real_network_with_chains() -> None:
    model = torchvision.models.mobilenet_v2(num_classes=10).eval()
    sb.convert(model)
    sb.apply(model, share_of_channels(model, 0.1))
    x = torch.randn(2, 3, 64, 64)
    explanation = explain(model, x)
    assert explanation.total == saved_bytes(lambda: model(x))
    names = {name for name, _ in model.named_modules()} | {"(model)"}
    assert {keeper for row in explanation.rows for keeper in row.keepers} <= names


def by_keeper(model: nn.Module, x: Tensor) -> dict[str, tuple[str, ...]]:
    return {
        keeper: row.free for row in explain(model, x).rows for keeper in row.keepers if row.dtype != "int64"
    }


def test_advice_follows_the_keeper() -> None:
    x = torch.randn(4, 3, 12, 12)
    free = by_keeper(converted("train"), x)
    assert any("frozen" in advice for advice in free["norm"])
    assert any('axis "in"' in advice for advice in free["stem.0"])
    assert any("fewer groups" in advice for advice in free["depthwise.0"])
    assert any(
        "lean version" in advice for advice in free["(model)"]
    )  # torch.relu in the model's own forward
    assert "freeze it: Linear is trained whole" in free["head"]
    assert any("fewer input channels" in advice for advice in by_keeper(converted(axis="in"), x)["stem.0"])


def test_what_no_module_keeps_is_said_to_be_outside() -> None:
    assert "the loss, or code around the model" in how_to_free(None, torch.float32)


def test_the_advice_is_true() -> None:
    """Doing what the row says takes exactly its bytes away (and those that depend on it)."""
    model, x = converted(), torch.randn(4, 3, 12, 12)
    row = next(
        row for row in explain(model, x).rows if row.keepers == ("grouped",) and row.dtype == "float32"
    )
    before = saved_bytes(lambda: model(x))
    selection = dict(share_of_channels(model, 0.5))
    index = len(torch.as_tensor(selection.pop("grouped").index)) * 8
    sb.apply(model, selection)
    assert saved_bytes(lambda: model(x)) == before - row.nbytes - index


class Mixed(nn.Module):
    """What cannot be lean, one of each: an activation, a functional, a subclass, a bypassed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mish = nn.Mish()
        self.own = OwnLinear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.mish(self.first(x)))
        x = self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(F.softplus(x))
        return out


class OwnLinear(nn.Linear):
    pass


def test_what_stays_dense_has_a_reason() -> None:
    model, x = Mixed(), torch.randn(2, 5, 8)
    sb.convert(model)
    sb.apply(model, {"first": [0, 1]})
    explanation = explain(model, x)
    assert explanation.total == saved_bytes(lambda: model(x))
    dense = explanation.dense
    assert "Mish has no lean version" in dense["mish"]
    assert "subclass" in dense["own"]
    assert "MultiheadAttention" in dense["attention.out_proj"]
    assert "always_train" in dense["head"]
    assert "only modules are swapped" in dense["(model)"]
    assert "first" not in dense


def test_norms_in_train_mode_are_named() -> None:
    dense = explain(converted("train"), torch.randn(4, 3, 12, 12)).dense
    assert {"stem.1", "depthwise.1", "norm"} <= set(dense)


def test_table_and_json() -> None:
    explanation = explain(converted("train"), torch.randn(4, 3, 12, 12))
    text = str(explanation)
    assert "kept by" in text and "stays dense:" in text and "stem.0 (SparseConv2d)" in text
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["total"] == explanation.total == sum(row["nbytes"] for row in data["rows"])
    assert data["dense"] and data["rows"][0]["keepers"]


def test_the_model_is_not_touched() -> None:
    model, x = converted("train"), torch.randn(4, 3, 12, 12)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    explain(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_under_no_grad_it_still_explains() -> None:
    model, x = converted(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        assert explain(model, x).total > 0
