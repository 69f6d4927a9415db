"""The trained channels alone: what goes into the file, what a load gives back and refuses, how several are merged."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparse_bwd as sb
from sparse_bwd.nn.slot import Slot
from sparse_bwd.sharing import Trained, current_selection, load_trained, merge_trained, save_trained
from sparse_bwd.sharing.parts import Part, digest
from tests.small import Small, labelled, small_net, train

State = dict[str, torch.Tensor]
AXES = ("out", "in")


def fresh(seed: int = 0) -> nn.Module:
    """A network of every kind of layer, not converted; the same weights for the same seed."""
    torch.manual_seed(seed)
    return Small()


def selection(axis: str = "out") -> sb.Selection:
    names = {"stem": [1, 2], "depth": [0, 7], "grouped": [3], "hidden": [0, 5]}
    return sb.Selection({name: sb.Channels(index, axis) for name, index in names.items()})


def step(model: nn.Module, seed: int = 3) -> None:
    """An optimizer step that moves every trained value."""
    optimizer = torch.optim.AdamW(sb.trainable_parameters(model), lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, 6, 6, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def tuned(axis: str = "out", seed: int = 3, chosen: sb.Selection | None = None, **convert: Any) -> nn.Module:
    model = fresh()
    sb.convert(model, **convert)
    sb.apply(model, chosen or selection(axis))
    step(model, seed)
    return model


def assert_same(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("axis", AXES)
def test_a_file_turns_the_base_into_the_trained_network(tmp_path: Path, axis: str, converted: bool) -> None:
    model, base = tuned(axis), fresh()
    saved = save_trained(model, tmp_path / "t.safetensors", base, notes={"task": "birds"})
    other = fresh()
    if converted:
        sb.convert(other)
        sb.apply(other, {"stem": [2, 4]})  # overlaps with what is loaded
    loaded = load_trained(other, tmp_path / "t.safetensors")
    x = labelled()[0]
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert_same(other.state_dict(), model.state_dict())
    assert loaded.notes == {"task": "birds"} and loaded.base == saved.base
    assert loaded.selection == current_selection(model)
    sb.apply(other, loaded.selection) if converted else None
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("axis", AXES)
def test_only_the_trained_slices_are_stored(axis: str) -> None:
    model = tuned(axis)
    trained = save_trained(model, None, fresh())
    parameters = sb.trainable_parameters(model)  # the compact ones and the head
    assert trained.nbytes == sum(parameter.nbytes for parameter in parameters)
    assert {name for name, part in trained.parts.items() if part.slot.index is None} == {
        "head.weight",
        "head.bias",
    }
    for name, layer in sb.layers(model).items():
        slot = trained.parts[f"{name}.weight"].slot
        assert (
            slot.index is not None and layer.channels is not None and torch.equal(slot.index, layer.channels)
        )
    assert set(trained.base) == set(fresh().state_dict()) - {"head.weight", "head.bias"}


def test_what_earlier_selections_trained_is_in_the_file_too() -> None:
    model = tuned("out", chosen=sb.Selection({"stem": [0]}))
    sb.apply(model, {"stem": [5]})
    step(model)
    trained = save_trained(model, None, fresh())
    assert trained.parts["stem.weight"].slot.index.tolist() == [0, 5]
    assert trained.selection == sb.Selection({"stem": [5]})
    other = fresh()
    load_trained(other, trained)
    assert_same(other.state_dict(), model.state_dict())


def test_selected_channels_are_in_the_file_even_where_no_value_moved() -> None:
    model = fresh()
    sb.convert(model, always_train=[])
    sb.apply(model, {"hidden": sb.Channels([1, 2], "in"), "norm": [3]})
    trained = save_trained(model, None, fresh())
    assert {name: part.slot.index.tolist() for name, part in trained.parts.items()} == {
        "hidden.weight": [1, 2],
        "norm.bias": [3],
    }


@pytest.mark.parametrize("mode", ["bias", "train"])
def test_norms_and_their_statistics_go_along(mode: str) -> None:
    model = tuned("out", batch_norm=mode)
    trained = save_trained(model, None, fresh())
    assert ("norm.running_mean" in trained.parts) == (mode == "train") and "norm.bias" in trained.parts
    other = fresh()
    load_trained(other, trained)
    assert_same(other.state_dict(), model.state_dict())


def test_a_restored_network_can_be_saved_but_knows_no_selection(tmp_path: Path) -> None:
    model = tuned()
    before = save_trained(model, None, fresh())
    sb.restore(model)
    after = save_trained(model, tmp_path / "t.safetensors", fresh())
    assert after.selection is None and before.nbytes == after.nbytes
    other = fresh()
    load_trained(other, tmp_path / "t.safetensors")
    assert_same(other.state_dict(), model.state_dict())


def test_the_base_may_be_a_model_a_state_dict_or_a_file(tmp_path: Path) -> None:
    save_file(fresh().state_dict(), tmp_path / "base.safetensors")
    model, parts = tuned(), []
    for base in (
        fresh(),
        fresh().state_dict(),
        tmp_path / "base.safetensors",
        str(tmp_path / "base.safetensors"),
    ):
        parts.append(save_trained(model, None, base))
    for trained in parts[1:]:
        assert trained.base == parts[0].base
        assert_same(
            {name: part.values for name, part in trained.parts.items()},
            {name: part.values for name, part in parts[0].parts.items()},
        )


def test_a_new_classifier_is_whole_and_needs_no_equal_one(tmp_path: Path) -> None:
    base, model, other = fresh(), fresh(), fresh()
    model.head, other.head = nn.Linear(6, 9), nn.Linear(6, 9)
    sb.convert(model)
    sb.apply(model, selection())
    step(model)
    save_trained(model, tmp_path / "t.safetensors", base)
    load_trained(other, tmp_path / "t.safetensors")
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["stem.weight", "hidden.bias", "norm.running_var"])
def test_another_base_is_refused_and_stays_as_it_is(name: str) -> None:
    trained = save_trained(tuned(), None, fresh())
    other = fresh()
    other.state_dict()[name].view(-1)[-1] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=rf"not the base that was trained: 1 of \d+ tensors.*'{name}'"):
        load_trained(other, trained)
    assert_same(other.state_dict(), before)


def test_networks_that_do_not_fit_are_refused() -> None:
    trained = save_trained(tuned(), None, fresh())
    wide, half = fresh(), fresh().bfloat16()
    wide.hidden = nn.Linear(13, 6)
    for model, why in (
        (nn.Linear(3, 3), "has no 'stem.weight'"),
        (wide, "'hidden.weight' does not fit the model's shape"),
        (half, "holds torch.float32, the model torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=why):
            load_trained(model, trained)


def test_a_base_that_is_none_is_refused(tmp_path: Path) -> None:
    model = tuned()
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    for base, why in (
        (model, "the trained model itself"),
        ({"other": torch.zeros(1)}, "no tensor of the model's names"),
        (fresh().double(), "torch.float32 in the model and torch.float64 in the base"),
        (tmp_path / "bad.safetensors", "cannot be read"),
        (tmp_path / "absent.safetensors", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=why):
            save_trained(model, tmp_path / "t.safetensors", base)
    with pytest.raises(TypeError, match="a model, a state dict or a path"):
        save_trained(model, None, 7)
    assert not (tmp_path / "t.safetensors").exists()


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_trained(tuned(), path, fresh())
    good = path.read_bytes()
    assert b'\\"groups\\": 1' in good
    for bad in (
        good[:-9],
        b"",
        good.replace(b'"version": "1"', b'"version": "2"'),
        good.replace(b"trained channels", b"trained channelz"),
        good.replace(b'\\"groups\\": 1', b'\\"groups\\": 0'),
        good.replace(b'\\"base\\"', b'\\"bass\\"'),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"\.$"):
            load_trained(fresh(), path)


def test_channels_outside_the_layer_are_refused() -> None:
    model = fresh()
    hash_of = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    for index, dim, shape in (([12], 0, (1, 6)), ([-1], 0, (1, 6)), ([12], 1, (6, 1)), ([0], 1, (6, 2))):
        part = Part(Slot(torch.tensor(index), dim, 1), torch.ones(shape))
        with pytest.raises(ValueError, match="does not fit"):
            load_trained(model, Trained({"hidden.weight": part}, hash_of, None, {}))


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "t.safetensors").write_bytes(pickle.dumps({"parts": Bomb()}))
    with pytest.raises(ValueError, match="cannot be read"):
        load_trained(fresh(), tmp_path / "t.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    saved = save_trained(tuned(), tmp_path / "t.safetensors", fresh())
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert (
            file.metadata()["format"] == "sparse_bwd trained channels" and file.metadata()["version"] == "1"
        )
        assert torch.equal(file.get_tensor("parts.stem.weight.index"), torch.tensor([1, 2]))
        stored = sum(file.get_tensor(name).nbytes for name in file.keys() if name.endswith("values"))  # noqa: SIM118
    assert stored == saved.nbytes


def test_channels_that_do_not_collide_are_merged(tmp_path: Path) -> None:
    base = {**fresh().state_dict()}
    paths = []
    for number, chosen in enumerate(({"stem": [0, 2]}, {"stem": [1], "hidden": sb.Channels([4], "in")})):
        model = fresh()
        sb.convert(model, always_train=[])
        sb.apply(model, chosen)
        step(model, seed=number)
        paths.append(tmp_path / f"{number}.safetensors")
        save_trained(model, paths[-1], base)
    merged = merge_trained(paths, tmp_path / "both.safetensors")
    model = fresh()
    load_trained(model, tmp_path / "both.safetensors")
    expected = copy.deepcopy(base)
    for path in paths:
        for name, part in Trained.read(path).parts.items():
            expected[name].index_copy_(part.slot.dim, part.slot.index, part.values)
    assert_same(model.state_dict(), expected)
    assert merged.parts["stem.weight"].slot.index.tolist() == [0, 1, 2] and merged.selection is None


@pytest.mark.parametrize("axis", AXES)
def test_collisions_are_refused_or_averaged(axis: str) -> None:
    sets = [save_trained(tuned(axis, seed=seed), None, fresh()) for seed in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"File 1 and file 2 both trained channels .* of 'stem.weight'"):
        merge_trained(sets)
    merged = merge_trained(sets, collisions="average", weights=[1, 2, 5])
    for name, part in merged.parts.items():
        values = [trained.parts[name].values.double() for trained in sets]
        mean = sum(w * v for w, v in zip((1, 2, 5), values, strict=True)) / 8
        torch.testing.assert_close(part.values, mean.float(), rtol=0, atol=1e-6)
    model = fresh()
    load_trained(model, merged)
    assert merged.selection == sets[0].selection


def test_the_mean_is_over_those_that_trained_a_channel() -> None:
    chosen = [{"stem": [0, 1]}, {"stem": [1, 4]}]
    sets = [
        save_trained(tuned(seed=n, chosen=sb.Selection(c), always_train=[]), None, fresh())
        for n, c in enumerate(chosen)
    ]
    a, b = (trained.parts["stem.weight"].values for trained in sets)
    merged = merge_trained(sets, collisions="average", weights=[3, 1]).parts["stem.weight"]
    assert merged.slot.index.tolist() == [0, 1, 4]
    assert torch.equal(merged.values[0], a[0]) and torch.equal(merged.values[2], b[1])
    torch.testing.assert_close(merged.values[1], (3 * a[1] + b[0]) / 4)


def test_equal_values_do_not_collide_and_counts_take_the_largest() -> None:
    one = save_trained(tuned(), None, fresh())
    assert_same(
        {name: part.values for name, part in merge_trained([one, one]).parts.items()},
        {name: part.values for name, part in one.parts.items()},
    )
    longer = tuned(batch_norm="train")
    step(longer)
    merged = merge_trained(
        [save_trained(tuned(batch_norm="train"), None, fresh()), save_trained(longer, None, fresh())],
        collisions="average",
    )
    assert merged.parts["norm.num_batches_tracked"].values.item() == 2


def test_a_whole_layer_and_some_of_its_channels_collide_where_they_meet() -> None:
    whole = save_trained(tuned(chosen=sb.Selection({"stem": None})), None, fresh())
    some = save_trained(tuned(seed=4, chosen=sb.Selection({"stem": [3]})), None, fresh())
    merged = merge_trained([whole, some], collisions="average").parts["stem.weight"].values
    a, b = whole.parts["stem.weight"].values, some.parts["stem.weight"].values
    torch.testing.assert_close(merged[3], (a[3] + b[0]) / 2)
    assert torch.equal(merged[:3], a[:3]) and torch.equal(merged[4:], a[4:])


def test_what_cannot_be_merged_is_refused() -> None:
    one = save_trained(tuned(), None, fresh())
    base = fresh(1)
    foreign = fresh(1)
    sb.convert(foreign)
    sb.apply(foreign, selection())
    step(foreign)
    other = save_trained(foreign, None, base)
    crossing = save_trained(tuned("in"), None, fresh())
    for sets, words, why in (
        ([one, other], {}, "different base weights"),
        ([one, crossing], {"collisions": "average"}, "one axis"),
        ([], {}, "nothing to merge"),
        ([one], {"collisions": "sum"}, "'refuse' or 'average'"),
        ([one, one], {"weights": [1]}, "2 positive numbers"),
        ([one], {"weights": [0]}, "1 positive numbers"),
    ):
        with pytest.raises(ValueError, match=why):
            merge_trained(sets, **words)


def test_wrappers_are_looked_through() -> None:
    model, base = tuned(), fresh()
    plain = save_trained(model, None, base)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert save_trained(wrapper, None, base).parts.keys() == plain.parts.keys()
    with pytest.raises(ValueError, match="the trained model itself"):
        save_trained(nn.DataParallel(model), None, model)


def test_a_loaded_network_trains_on_like_the_saved_one() -> None:
    model = small_net()
    base = copy.deepcopy(model.state_dict())
    sb.RandomPolicy(model, sb.Budget(fraction=0.3)).step()
    train(model, 0)
    other = small_net()
    loaded = load_trained(other, save_trained(model, None, base))
    sb.apply(other, loaded.selection)
    train(model, 1)
    train(other, 1)
    assert_same(other.state_dict(), model.state_dict())
