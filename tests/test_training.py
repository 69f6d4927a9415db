"""Recipes, models, weights, policies in the loop, and runs that go wrong in their numbers."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_bwd as sb
from sparse_bwd.memory.predict import find_optimizer
from sparse_bwd.selection.charges import state_numbers
from sparse_bwd.selection.responses import ResponseMeter
from sparse_bwd.selection.sketch import SketchMeter
from sparse_bwd.training import (
    Diverged,
    RunConfig,
    Runtime,
    UserError,
    configure,
    finetune,
    load_run,
    saved_config,
    seeding,
)
from sparse_bwd.training.checkpoint import save_checkpoint
from sparse_bwd.training.config import check_unchanged, parse_budget
from sparse_bwd.training.finish import find_collapse
from sparse_bwd.training.log import read_log
from sparse_bwd.training.models import build_model, check_width, head_name
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.prepare import find_device, open_data, prepare
from sparse_bwd.training.recipe import RECIPES, find_recipe
from sparse_bwd.training.weights import load_weights
from tests import training_net

TINY = "tests.training_net:tiny"
SMALL: dict[str, Any] = {
    "image_size": 16, "limit_train": 138, "limit_test": 50, "epochs": 2, "lr": 0.1, "budget": "20%",
}  # fmt: skip


def small_run(out: Path, **options: Any) -> dict[str, Any]:
    """A run of a few seconds on the digits."""
    runtime = {name: options.pop(name) for name in ("measure", "checkpoint_steps") if name in options}
    config = configure(RunConfig(options.pop("model", TINY), "digits"), {**SMALL, **options})
    return finetune(config, Runtime(out, quiet=True, **{"measure": False, **runtime}))


# Recipes and configurations


def test_the_paper_recipe_is_the_papers() -> None:
    paper = find_recipe("paper")
    steps = 10
    rates = [paper.learning_rate(step, steps) for step in range(205 * steps)]
    assert rates[0] == 0 and max(rates) == rates[50] == 0.125 and rates[-1] < 1e-6
    assert rates[25] == pytest.approx(0.0625) and rates[50 + 1000] == pytest.approx(0.0625)
    assert (paper.momentum, paper.weight_decay, paper.clip_norm, paper.batch_norm) == (0, 0, 0, "train")
    assert (paper.batch_size, paper.probe_images, paper.augment, paper.eval_every) == (32, 10, "paper", 5)


def test_warm_up_never_takes_more_than_half_of_a_run() -> None:
    short = dataclasses.replace(RECIPES["paper"], epochs=2)
    assert short.learning_rate(10, 10) == short.lr


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"epochs": 0},
        {"momentum": -1.0},
        {"batch_norm": "frozn"},
        {"augment": "x"},
        {"optimizer": "adam"},
    ],
)
def test_recipes_refuse_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        dataclasses.replace(RECIPES["default"], **wrong)


@pytest.mark.parametrize(
    "options, predicted, numbers",
    [
        ({"momentum": 0.9}, "sgd_momentum", 1),
        ({"momentum": 0.0}, "sgd", 0),
        ({"optimizer": "adamw"}, "adamw", 2),
    ],
)
def test_the_optimizer_is_the_one_that_is_predicted(
    options: dict[str, Any], predicted: str, numbers: int
) -> None:
    """As many numbers of state per trained number as `predict` counts for a budget of bytes."""
    recipe = dataclasses.replace(RECIPES["default"], weight_decay=0.05, **options)
    model = training_net.tiny(10)
    optimizer = make_optimizer(recipe, model)
    assert recipe.predicted_optimizer == predicted
    assert round(state_numbers(find_optimizer(predicted))) == numbers
    assert optimizer.defaults["lr"] == recipe.lr and optimizer.defaults["weight_decay"] == 0.05
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    trained = sb.trainable_parameters(model)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(s.numel() for s in states if s.dim()) == numbers * sum(p.numel() for p in trained)


@pytest.mark.parametrize(
    "text, amount",
    [
        ("192311", {"params": 192311}),
        ("192,311", {"params": 192311}),
        ("0.5", {"fraction": 0.5}),
        ("0", {"params": 0}),
    ],
)
def test_budgets_are_read(text: str, amount: dict[str, Any]) -> None:
    assert parse_budget(text) == amount
    assert parse_budget("8.8%") == {"fraction": pytest.approx(0.088)}


@pytest.mark.parametrize("text", ["", "lots", "-5", "101%", "1.5", "nan", "-0.1"])
def test_budgets_refuse_nonsense(text: str) -> None:
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ({"policy": "velocty"}, "velocity"),
        ({"axis": "inn"}, "in"),
        ({"recursion": "papr"}, "paper"),
        ({"recipe": "papre"}, "paper"),
        ({"velocity": "sketsh"}, "sketch"),
        ({"probe": "nois"}, "noise"),
    ],
)
def test_unknown_words_list_the_nearest(wrong: dict[str, str], nearest: str) -> None:
    with pytest.raises(UserError, match=f"nearest names are .*{nearest}"):
        configure(RunConfig(TINY, "digits"), wrong)


def test_configurations_travel_as_json() -> None:
    config = configure(
        RunConfig(TINY, "digits"), {"recipe": "paper", "lr": 0.5, "mean": (0.1, 0.2, 0.3), "policy": "full"}
    )
    assert config.recipe.lr == 0.5 and config.recipe.epochs == 205
    values = json.loads(json.dumps(config.to_json()))
    assert RunConfig.from_json(values) == config
    del values["velocity"]
    assert RunConfig.from_json(values).velocity == "exact"


def test_a_run_that_has_begun_stays_what_it_is() -> None:
    config = configure(RunConfig(TINY, "digits"), {"lr": 0.5})
    check_unchanged(config, {"model": TINY, "lr": 0.5, "recipe": "default"})
    with pytest.raises(UserError, match="another --lr, --image-size"):
        check_unchanged(config, {"model": TINY, "lr": 0.4, "image_size": 9})
    with pytest.raises(UserError, match="another --recipe"):
        check_unchanged(config, {"model": TINY, "recipe": "paper"})
    with pytest.raises(UserError, match=f"give --model {TINY}"):
        check_unchanged(config, {})


# Models


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "squeezenet1_1", "mobilenetv2_050", "googlenet", TINY, "tests.training_net:wide"]
)
def test_heads_have_the_width_of_the_data(name: str) -> None:
    model = build_model(name, 7)
    head = head_name(model)
    assert head is not None
    layer = model.get_submodule(head)
    assert getattr(layer, "out_features", None) == 7 or getattr(layer, "out_channels", None) == 7
    check_width(model, 7, 64, name)
    assert model.training


def test_a_network_without_layers_has_no_head() -> None:
    assert head_name(nn.Sequential(nn.Flatten())) is None


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("mobilenet_v22", "nearest names are mobilenet_v2"),
        ("no.such.module:f", "cannot be imported"),
        ("tests.training_net:absent", "has nothing called 'absent'"),
        ("tests.training_net:number", "returned int"),
        ("tests.training_net:bare_linear", "a single Linear of 3 outputs; give it 7"),
    ],
)
def test_unknown_models_are_explained(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_model(name, 7)


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"gives \(2, 4, 14, 14\) for two images"):
        check_width(training_net.headless(), 4, 16, "headless")
    with pytest.raises(UserError, match="does not run on 16 x 16 images"):
        check_width(training_net.broken(), 10, 16, "broken")


# Weights


def test_only_the_classifier_may_be_missing(tmp_path: Path) -> None:
    full = training_net.tiny(10).state_dict()
    body = {key: value for key, value in full.items() if not key.startswith("6.")}
    path = tmp_path / "w.safetensors"
    for state, fresh in (
        (full, False),
        (body, True),
        ({**body, "6.weight": torch.zeros(1000, 16), "AuxLogits.fc.bias": torch.zeros(1000)}, True),
    ):
        save_file(state, path)
        model = training_net.tiny(10)
        assert load_weights(model, str(path), TINY).fresh_head is fresh
        assert torch.equal(model.get_parameter("0.0.weight"), full["0.0.weight"])
    save_file({key: value for key, value in full.items() if key not in ("0.0.weight", "1.1.bias")}, path)
    with pytest.raises(UserError, match=r"they lack 2 \(0\.0\.weight, 1\.1\.bias\)"):
        load_weights(training_net.tiny(10), str(path), TINY)
    save_file({**full, "0.0.weight": torch.zeros(9, 3, 3, 3), "other.thing": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"other shapes for 0\.0\.weight; they have no place in the model for other\.thing"
    ):
        load_weights(training_net.tiny(10), str(path), TINY)


def test_pytorch_files_are_read_without_running_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "w.pt"
    state = training_net.tiny(10).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    model = training_net.tiny(10)
    load_weights(model, str(path), TINY)
    assert torch.equal(model.get_parameter("6.bias"), state["6.bias"])
    torch.save({"a": Bomb()}, path)
    with pytest.raises(UserError, match="not loaded, because that could run code"):
        load_weights(model, str(path), TINY)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("w.safetensors", b"nonsense", "not a readable safetensors file"),
        ("w.pt", b"nonsense", "damaged or holds more than tensors|cannot be read"),
        ("w.pt", b"", "cannot be read|damaged"),
        ("w.npz", b"", "must end in one of"),
    ],
)
def test_unreadable_weights_are_explained(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_weights(training_net.tiny(10), str(tmp_path / name), TINY)


def test_files_without_a_state_dict_are_explained(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_weights(training_net.tiny(10), str(tmp_path / "w.pth"), TINY)


@pytest.mark.parametrize(
    "model, weights, sentence",
    [
        ("mobilenet_v2", "IMAGENET1K_V3", "nearest names are"),
        ("mobilenetv2_050", "IMAGENET", "known names are|nearest names are"),
        (TINY, "DEFAULT", "give a file, or none"),
        (TINY, "absent.safetensors", "does not exist"),
    ],
)
def test_unknown_weights_are_explained(model: str, weights: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_weights(build_model(model, 10), weights, model)


def test_named_weights_come_from_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torchvision.models import MobileNet_V2_Weights

    donor = build_model("mobilenet_v2", 1000)
    asked: dict[str, Any] = {}

    def give(self: object, **options: Any) -> dict[str, torch.Tensor]:
        asked.update(options)
        return dict(donor.state_dict())

    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", give)
    model = build_model("mobilenet_v2", 10)
    assert load_weights(model, "DEFAULT", "mobilenet_v2").fresh_head
    assert asked["weights_only"] is True and asked["check_hash"] is True
    assert torch.equal(model.get_parameter("features.0.0.weight"), donor.get_parameter("features.0.0.weight"))

    def offline(self: object, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_weights(model, "DEFAULT", "mobilenet_v2")

    def create(name: str, pretrained: bool) -> nn.Module:
        raise RuntimeError("no cache")

    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(UserError, match="could not be fetched: no cache"):
        load_weights(model, "pretrained", "mobilenetv2_050")
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: donor)
    assert load_weights(model, "pretrained", "mobilenetv2_050").fresh_head


# Runs


@pytest.mark.parametrize(
    "policy, axis, batch_norm",
    [
        ("velocity", "out", "train"),
        ("velocity", "in", "bias"),
        ("slowest", "out", "frozen"),
        ("random", "out", "bias"),
        ("full", "out", "train"),
        ("frozen", "out", "frozen"),
        ("sparse-update", "in", "bias"),
        ("neq", "out", "train"),
        ("trady", "in", "bias"),
        ("gradient", "out", "train"),
        ("weight", "in", "frozen"),
    ],
)
def test_every_policy_trains_within_its_budget(
    tmp_path: Path, policy: str, axis: str, batch_norm: str
) -> None:
    scheme = tmp_path / "scheme.json"
    scheme.write_text(json.dumps({"version": 1, "n_bias": 2, "indices": [1, 2], "ratios": [0.5, 1.0]}))
    out = tmp_path / "run"
    result = small_run(out, policy=policy, axis=axis, batch_norm=batch_norm, scheme=str(scheme), measure=True)
    costs = {"full": 1512, "frozen": 0, "sparse-update": 4 * 16 * 9 + 144}
    assert result["cost"] == costs.get(policy, result["cost"])
    if policy == "neq":
        assert result["budget"] is None and 0 < result["cost"] <= 1512
    elif policy not in costs:
        assert result["budget"] == 302 and 302 - 144 < result["cost"] <= 302
    assert result["saved_bytes"] > 0 and result["peak_bytes"] > 0 and result["ms_per_step"] > 0
    assert len(result["accuracy_per_epoch"]) == 2 and result["accuracy"] == result["accuracy_per_epoch"][-1]
    assert result == json.loads((out / "result.json").read_text())
    plain = training_net.tiny(10)
    plain.load_state_dict(load_file(out / "model.safetensors"))
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors", "classes.json", "log.jsonl", "model.safetensors", "preprocessing.json", "result.json",
    ]  # fmt: skip
    events = [line["event"] for line in read_log(out / "log.jsonl")]
    assert events == ["start", "selection", "epoch", "selection", "epoch", "end"]


@pytest.mark.parametrize("policy", ["random", "frozen", "full"])
def test_what_no_budget_counts_trains_under_full_alone(policy: str) -> None:
    config = configure(RunConfig("tests.training_net:Tokens", "digits"), {**SMALL, "policy": policy})
    prepared = prepare(config, Runtime(Path("unused")))
    assert prepared.model.get_parameter("position").requires_grad == (policy == "full")
    frozen = [note for note in prepared.notes if "position" in note]
    sentence = "trained outside any budget" if policy == "full" else "the policy full trains them"
    assert len(frozen) == 1 and sentence in frozen[0]
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert any(note.startswith(f"trainable params: {trained:,} ||") for note in prepared.notes)


def test_a_run_learns(tmp_path: Path) -> None:
    """Digits at full resolution, all layers open: well above guessing after two epochs."""
    result = small_run(
        tmp_path / "run", policy="full", batch_norm="train", limit_train=1200, epochs=3, flip=False
    )
    assert result["accuracy"] > 0.5 and result["warnings"] == []
    assert load_run(tmp_path / "run", TINY).classes == [str(number) for number in range(10)]


def test_unselected_weights_stay_bit_identical(tmp_path: Path) -> None:
    donor = training_net.tiny(10).state_dict()
    save_file(donor, tmp_path / "w.safetensors")
    small_run(tmp_path / "run", weights=str(tmp_path / "w.safetensors"), policy="frozen")
    trained = load_file(tmp_path / "run" / "model.safetensors")
    changed = {key for key in donor if not torch.equal(donor[key], trained[key])}
    assert changed == {"6.weight", "6.bias"}


def test_the_probe_is_never_trained_on_and_all_policies_see_the_same_images() -> None:
    config = configure(RunConfig(TINY, "digits"), SMALL)
    runs = [
        prepare(dataclasses.replace(config, policy=policy), Runtime(Path("x")))
        for policy in ("velocity", "full")
    ]
    assert runs[0].loader.samples.fingerprint() == runs[1].loader.samples.fingerprint()
    assert len(runs[0].loader.samples) == 128
    policy = runs[0].policy
    assert isinstance(policy, sb.VelocityPolicy)
    assert policy.probe.shape == (10, 3, 16, 16)
    for options in ({"probe_images": 138}, {"probe_images": 0}):
        with pytest.raises(UserError, match="probe"):
            prepare(configure(config, options), Runtime(Path("x")))


def test_a_probe_of_noise_takes_no_image_from_training() -> None:
    config = configure(RunConfig(TINY, "digits"), {**SMALL, "probe": "noise", "velocity": "sketch"})
    prepared = prepare(config, Runtime(Path("x")))
    assert len(prepared.loader.samples) == 138
    policy = prepared.policy
    assert isinstance(policy, sb.VelocityPolicy) and policy.probe.shape == (10, 3, 16, 16)
    assert (
        -1 <= float(policy.probe.min()) < -0.8 and 0.8 < float(policy.probe.max()) <= 1
    )  # normalised as images
    assert isinstance(policy.meter, SketchMeter)
    other = prepare(dataclasses.replace(config, seed=1), Runtime(Path("x"))).policy
    assert isinstance(other, sb.VelocityPolicy) and not torch.equal(policy.probe, other.probe)
    with pytest.raises(UserError, match="probe"):
        prepare(configure(config, {"probe_images": 0}), Runtime(Path("x")))


def test_policies_get_what_the_command_line_says() -> None:
    """Labels belong to the images of the probe; the options of NEq; TraDy's default axis."""

    def policy_of(**options: Any) -> Any:
        return prepare(configure(RunConfig(TINY, "digits"), {**SMALL, **options}), Runtime(Path("x"))).policy

    neq = policy_of(policy="neq", threshold=0.5, pin=True, velocity="exact")
    assert isinstance(neq, sb.NEqPolicy) and (neq.threshold, neq.pin, neq.axis) == (0.5, True, "out")
    assert isinstance(neq.meter, ResponseMeter) and neq.velocity.recursion == "reference"
    images, labels = policy_of(policy="gradient").meter.data
    assert torch.equal(images, policy_of(policy="velocity").probe) and images.shape == (10, 3, 16, 16)
    source = open_data(configure(RunConfig(TINY, "digits"), SMALL), Runtime(Path("x"))).train
    order = seeding.permutation(len(source), seeding.derive(0, "probe"))[:10]
    assert labels.tolist() == [source.targets[index] for index in order] and len(set(labels.tolist())) > 1
    trady = policy_of(policy="trady")
    assert isinstance(trady, sb.TraDyPolicy) and trady.axis == "in" and trady.meter is not None
    assert torch.equal(trady.meter.data[1], labels)
    weight = policy_of(policy="weight", axis="in")
    assert isinstance(weight, sb.WeightNormPolicy) and weight.axis == "in"
    for options in ({"policy": "trady", "probe": "noise"}, {"policy": "gradient", "probe": "noise"}):
        with pytest.raises(UserError, match="needs images with labels: leave out --probe noise"):
            policy_of(**options)
    for policy in ("neq", "trady", "gradient"):
        with pytest.raises(UserError, match="--probe-images must be above 0"):
            policy_of(policy=policy, probe_images=0)


def test_a_model_of_which_nothing_can_be_swapped_is_refused() -> None:
    config = configure(RunConfig("tests.training_net:linear_only", "digits"), SMALL)
    with pytest.raises(UserError, match=r"Nothing in the model .* could be swapped"):
        prepare(config, Runtime(Path("x")))


def test_a_configuration_of_another_version_is_explained(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.safetensors", {"config": {"model": "x"}})
    with pytest.raises(UserError, match="has a configuration that this version cannot read"):
        saved_config(tmp_path)


def test_divergence_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss became (nan|inf) at step 4 .* lower --lr"):
        small_run(tmp_path / "run", model="tests.training_net:exploding", checkpoint_steps=2)
    found = saved_config(tmp_path / "run")
    assert found is not None
    saved = found[1]
    assert saved["batch"] == 2
    assert all(
        bool(torch.isfinite(tensor).all()) for tensor in saved["model"].values() if tensor.is_floating_point()
    )


def test_parameters_that_left_the_finite_numbers_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.SGD.step

    def spoil(self: torch.optim.SGD, closure: None = None) -> None:
        step(self, closure)
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    with pytest.raises(Diverged, match="no longer finite at step 1"):
        small_run(tmp_path / "run", checkpoint_steps=1)
    found = saved_config(tmp_path / "run")
    assert found is not None and found[1]["batch"] == 0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(math.nan))
    with pytest.raises(Diverged, match="the gradient became nan at step 1"):
        small_run(tmp_path / "run")


def _rows(losses: list[float], accuracies: list[float]) -> list[dict[str, Any]]:
    return [{"train_loss": loss, "test_accuracy": a} for loss, a in zip(losses, accuracies, strict=True)]


@pytest.mark.parametrize(
    "losses, accuracies, sentence",
    [
        ([2.0, 1.0], [0.5, 0.8], None),
        ([1.0, 1.5], [0.5, 0.5], "rose from 1.000"),
        ([2.0, 9.0], [0.5, 0.5], "above the 2.303 of guessing"),
        ([2.0, 1.0], [0.9, 0.5], "fell from 90.0% to 50.0%"),
        ([2.2, 2.1], [0.1, 0.1], "that of guessing"),
    ],
)
def test_collapse_is_reported(losses: list[float], accuracies: list[float], sentence: str | None) -> None:
    found = find_collapse(_rows(losses, accuracies), classes=10)
    assert (sentence in found[0]) if sentence else not found


def test_devices_that_are_not_here_are_explained() -> None:
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match="use --device cpu"):
            find_device(name)
    with pytest.raises(UserError, match="--threads is 0"):
        prepare(configure(RunConfig(TINY, "digits"), SMALL), Runtime(Path("x"), threads=0))
