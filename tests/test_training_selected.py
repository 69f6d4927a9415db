"""What a run says of itself for later: trained channels per epoch, held-back images, policies drawn once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_bwd as sb
from sparse_bwd.training import RunConfig, Runtime, UserError, configure, finetune
from sparse_bwd.training.log import read_log
from sparse_bwd.training.prepare import open_data
from sparse_bwd.training.selected import decode, encode, read_selections

TINY = "tests.training_net:tiny"
SMALL: dict[str, Any] = {
    "image_size": 16, "limit_train": 138, "limit_test": 50, "epochs": 3, "lr": 0.1, "budget": "20%",
}  # fmt: skip


def small_run(out: Path, **options: Any) -> dict[str, Any]:
    measure = options.pop("measure", False)
    config = configure(RunConfig(TINY, "digits"), {**SMALL, **options})
    return finetune(config, Runtime(out, quiet=True, measure=measure))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 321])
def test_masks_survive_the_log(size: int) -> None:
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(size))[: size // 2 + 1]
    selection = sb.Selection({"some": chosen, "all": None, "none": sb.Channels([], bias="all")})
    masks = encode(selection, {"some": size, "all": size, "none": size, "absent": size})
    assert sorted(masks) == ["all", "some"] and decode(masks["all"], size).all()
    assert decode(masks["some"], size).nonzero().flatten().tolist() == sorted(chosen.tolist())
    with pytest.raises(ValueError, match="bytes"):
        decode(masks["some"], size + 8)


@pytest.mark.parametrize(("policy", "axis"), [("velocity", "in"), ("random", "out"), ("full", "out")])
def test_the_log_holds_every_epochs_channels(tmp_path: Path, policy: str, axis: str) -> None:
    result = small_run(tmp_path / "run", policy=policy, axis=axis)
    epochs = read_selections(tmp_path / "run" / "log.jsonl")
    assert len(epochs) == 3 and all(list(epoch) == list(epochs[0]) for epoch in epochs)
    for epoch, row in zip(epochs, result["epochs"], strict=True):
        assert sum(int(mask.sum()) for mask in epoch.values()) == row["channels"]
        assert sum(bool(mask.any()) for mask in epoch.values()) == row["layers"]
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "selection"]
    assert all(line["seconds"] > 0 and line["axis"] == axis for line in lines)


def test_an_old_log_is_refused_with_a_sentence(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"event": "selection", "for_epoch": 1}) + "\n")
    with pytest.raises(UserError, match="does not say which channels"):
        read_selections(log)


def test_random_can_be_drawn_once(tmp_path: Path) -> None:
    for redraw in (True, False):
        small_run(tmp_path / str(redraw), policy="random", redraw=redraw)
        epochs = read_selections(tmp_path / str(redraw) / "log.jsonl")
        same = [all(epochs[0][name].equal(later[name]) for name in later) for later in epochs[1:]]
        assert all(same) if not redraw else not any(same)


def test_held_back_images_are_training_images_and_the_test_images_stay_closed(tmp_path: Path) -> None:
    config = configure(RunConfig(TINY, "digits"), {**SMALL, "validation": 0.25})
    runtime = Runtime(tmp_path / "run")
    whole, held = (open_data(c, runtime) for c in (configure(config, {"validation": 0.0}), config))
    names = {
        key: {source.name(i) for i in range(len(source))}
        for key, source in {
            "all": whole.train,
            "test": whole.test,
            "rest": held.train,
            "held": held.test,
        }.items()
    }
    assert names["rest"] | names["held"] == names["all"] and not names["rest"] & names["held"]
    assert not names["held"] & names["test"] and len(names["held"]) == pytest.approx(0.25 * 138, abs=5)
    assert "held back" in held.notes
    again = open_data(configure(config, {"seed": 9}), runtime)
    assert again.test.fingerprint() == held.test.fingerprint(), "all seeds hold back the same images"


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="--validation"):
        configure(RunConfig(TINY, "digits"), {"validation": share})


def test_parity_is_refused_for_policies_that_the_code_lacks() -> None:
    with pytest.raises(UserError, match="--parity is of velocity"):
        configure(RunConfig(TINY, "digits"), {"policy": "trady", "parity": True})


def test_the_result_counts_the_operations_of_backward(tmp_path: Path) -> None:
    """A frozen network does only the classifier's; a full one does more than one at 20 %."""
    found = {
        policy: small_run(tmp_path / policy, policy=policy, epochs=1, measure=True)["backward_flops"]
        for policy in ("frozen", "random", "full")
    }
    assert 0 < found["frozen"] < found["random"] < found["full"]
