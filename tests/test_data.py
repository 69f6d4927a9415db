"""Images: sources, splits, decoding of bad files, transforms, and batches that do not depend on how they are loaded."""

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from sparse_bwd.training import data, samples, seeding
from sparse_bwd.training.data import DataOptions, open_source
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.images import decode
from sparse_bwd.training.loader import TrainLoader, in_order, stacked
from sparse_bwd.training.samples import ArraySamples, DatasetSamples
from sparse_bwd.training.transforms import Preprocessing
from tests.pictures import bomb, garbage, make_folder, truncated

SMALL = Preprocessing(image_size=16)


def test_folder_without_a_test_part_is_split_per_class(tmp_path: Path) -> None:
    source = open_source(str(make_folder(tmp_path, per_class=10)))
    assert source.classes == ["ant", "bee"]
    assert sorted(source.train.targets) == [0] * 8 + [1] * 8
    assert sorted(source.test.targets) == [0] * 2 + [1] * 2
    names = [[part.name(i) for i in range(len(part))] for part in (source.train, source.test)]
    assert not set(names[0]) & set(names[1])
    again = open_source(str(tmp_path))
    assert again.test.fingerprint() == source.test.fingerprint()
    other = open_source(str(tmp_path), DataOptions(split_seed=1))
    assert other.test.fingerprint() != source.test.fingerprint()


@pytest.mark.parametrize("part", ["test", "val"])
def test_folder_with_two_parts_keeps_them(tmp_path: Path, part: str) -> None:
    make_folder(tmp_path / "train", 6, ("ant", "bee", "cat"))
    make_folder(tmp_path / part, 2, ("bee", "cat"))
    source = open_source(str(tmp_path))
    assert len(source.train) == 18
    assert source.test.targets == [1, 1, 2, 2]


def test_folder_with_a_train_part_only_is_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", 5)
    source = open_source(str(tmp_path))
    assert (len(source.train), len(source.test)) == (8, 2)


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    make_folder(tmp_path / "nested" / "inner", 2)
    with pytest.raises(UserError, match=r"did you mean .*inner\?"):
        open_source(str(tmp_path / "nested"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no folders"):
        open_source(str(tmp_path / "bare"))
    make_folder(tmp_path / "holey", 2)
    (tmp_path / "holey" / "cat").mkdir()
    with pytest.raises(UserError, match="cat has no images"):
        open_source(str(tmp_path / "holey"))
    make_folder(tmp_path / "more" / "train", 2)
    make_folder(tmp_path / "more" / "test", 2, ("ant", "dog"))
    with pytest.raises(UserError, match=r"classes that .*train lacks: dog"):
        open_source(str(tmp_path / "more"))
    make_folder(tmp_path / "single", 1)
    with pytest.raises(UserError, match="none is left to test on"):
        open_source(str(tmp_path / "single"))


def test_unknown_names_list_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nearest names are cifar10"):
        open_source("cifar01")
    with pytest.raises(UserError, match="known names are"):
        open_source("zzzzzz")
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "absent"))


def test_digits_and_fakedata() -> None:
    digits = open_source("digits")
    assert len(digits.train) + len(digits.test) == 1797
    image = digits.train.load(0)
    assert image.size == (8, 8) and image.mode == "RGB"
    assert 200 < np.asarray(image).max() <= 255
    fake = open_source("fakedata")
    assert (len(fake.train), len(fake.test)) == (256, 64)
    assert fake.train.load(3).mode == "RGB"
    fake.train.check()
    assert fake.train.name(3) == "fakedata training image 3"


def test_absent_torchvision_data_names_the_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data-root, or --download"):
        open_source("cifar10", DataOptions(root=tmp_path))


def test_failed_downloads_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(UserError, match="could not be downloaded: no network"):
        open_source("cifar10", DataOptions(root=tmp_path, download=True))

    def damaged(*args: object, **kwargs: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", damaged)
    with pytest.raises(UserError, match="could not be prepared"):
        open_source("cifar10", DataOptions(root=tmp_path, download=True))


class _FakeSet:
    """A torchvision data set with string classes and hidden labels."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._labels = [0, 1] * 10
        self.classes = ["one", "two"]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 7:
            raise OSError("broken data stream")
        return Image.new("L", (9, 9)), self._labels[index]


def test_torchvision_sets_without_a_split_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.EuroSAT", _FakeSet)
    source = open_source("eurosat")
    assert source.classes == ["one", "two"]
    assert (len(source.train), len(source.test)) == (16, 4)
    with pytest.raises(UserError, match=r"whole image 7 is corrupt \(OSError: broken data stream\)"):
        DatasetSamples(_FakeSet(), "whole").load(7)


@pytest.mark.parametrize("spoil", [garbage, truncated])
def test_a_corrupt_image_is_named(tmp_path: Path, spoil: data.Callable[[Path], Path]) -> None:
    make_folder(tmp_path)
    path = spoil(tmp_path / "bee" / "3.jpg")
    source = open_source(str(tmp_path))
    with pytest.raises(UserError, match=rf"{path} is corrupt"):
        source.train.check()
        source.test.check()


def test_large_sets_are_checked_by_header_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CHECK_WHOLE_BYTES", 0)
    make_folder(tmp_path)
    truncated(tmp_path / "bee" / "3.jpg")
    source = open_source(str(tmp_path))
    source.train.check()
    source.test.check()
    garbage(tmp_path / "ant" / "3.jpg")
    with pytest.raises(UserError, match="is corrupt"):
        source.train.select(range(len(source.train))).check()
        source.test.check()
    (tmp_path / "ant" / "3.jpg").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        source.train.check()
        source.test.check()


def test_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 12_000, 11_000)
    assert path.stat().st_size < 1000
    with pytest.raises(UserError, match="12000 x 11000 pixels, more than the limit"):
        decode(path, str(path))
    with pytest.raises(UserError, match="too large to decode safely"):
        decode(bomb(path, 50_000, 50_000), str(path))
    with pytest.raises(UserError, match="more than the limit of 300"):
        decode(bomb(path, 20, 20), str(path), max_pixels=300)


def test_other_unreadable_things_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        decode(tmp_path / "absent.png", "absent.png")
    with pytest.raises(UserError, match="is a folder"):
        decode(tmp_path, "it")
    postscript = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="corrupt or not one of JPEG"):
        decode(postscript, "drawing.eps")


def test_an_image_that_may_not_be_read_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match="may not be read: change its permissions"):
        decode(Path("x.png"), "x.png")


def test_digits_without_scikit_learn_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="needs scikit-learn"):
        open_source("digits")


def test_evaluation_equals_torchvision() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ours = SMALL.normalise(torch.from_numpy(SMALL.evaluation()(image).copy())[None])[0]
    steps = [tv.Resize(19), tv.CenterCrop(16), tv.ToTensor(), tv.Normalize([0.5] * 3, [0.5] * 3)]
    torch.testing.assert_close(ours, tv.Compose(steps)(image))


def test_preprocessing_travels_as_json_and_is_checked() -> None:
    own = Preprocessing(64, 1.0, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocessing.from_json(own.to_json()) == own
    for wrong in ({"image_size": 0}, {"crop_pct": 0.0}, {"std": (1.0, 0.0, 1.0)}):
        with pytest.raises(UserError, match="must be"):
            Preprocessing(**wrong)


def _loader(augment: str = "mild", workers: int = 0, count: int = 40, batch: int = 8) -> TrainLoader:
    images = np.random.default_rng(0).integers(0, 255, (count, 20, 24, 3), dtype=np.uint8)
    held = ArraySamples(images, [i % 4 for i in range(count)], "noise")
    return TrainLoader(held, SMALL.training(augment, True), batch, seed=5, workers=workers)


@pytest.mark.parametrize("augment", ["mild", "paper"])
def test_batches_depend_on_seed_epoch_and_position_only(augment: str) -> None:
    whole = list(_loader(augment).epoch(2))
    torch.rand(7), random.random()
    rest = list(_loader(augment, workers=2).epoch(2, first_batch=3))
    assert len(whole) == 5 and len(rest) == 2
    for (images, targets), (images_again, targets_again) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, images_again) and torch.equal(targets, targets_again)
    other = next(_loader(augment).epoch(3))
    assert not torch.equal(other[0], whole[0][0])
    assert whole[0][0].dtype is torch.uint8 and whole[0][0].shape == (8, 3, 16, 16)


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3), random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    list(_loader("paper").epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_incomplete_batches_are_dropped_unless_alone() -> None:
    assert [len(targets) for _, targets in _loader(count=19).epoch(0)] == [8, 8]
    assert [len(targets) for _, targets in _loader(count=5).epoch(0)] == [5]
    assert list(_loader().epoch(0, first_batch=5)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_while_training_is_one_sentence(tmp_path: Path, workers: int) -> None:
    source = open_source(str(make_folder(tmp_path)))
    for index in range(10):
        garbage(tmp_path / "bee" / f"{index}.jpg")
    loader = TrainLoader(source.train, SMALL.training("mild", False), 16, 0, workers)
    with pytest.raises(UserError, match=r"^The image .*jpg is corrupt or not one of") as error:
        list(loader.epoch(0))
    assert "Traceback" not in str(error.value)


def test_evaluation_sees_every_sample_once_in_order() -> None:
    held = _loader(count=19).samples
    targets = torch.cat([targets for _, targets in in_order(held, SMALL.evaluation(), 8)])
    assert targets.tolist() == held.targets
    assert stacked(held.select([3, 1]), SMALL.evaluation()).shape == (2, 3, 16, 16)


def test_limits_keep_the_proportions_of_the_classes() -> None:
    source = open_source("digits").limited(100, 20, seed=0)
    counts = torch.bincount(torch.tensor(source.train.targets))
    assert len(source.train) == 100 and counts.min() >= 9 and counts.max() <= 11
    assert sorted(source.test.targets) == sorted(list(range(10)) * 2)
    assert source.train.fingerprint() != open_source("digits").limited(100, 20, seed=1).train.fingerprint()
    with pytest.raises(UserError, match="--limit-train is 0"):
        source.limited(0, None, 0)


def test_derived_seeds_are_stable() -> None:
    assert seeding.derive(0, "augment", 1, 2) == 4658249614402003170
    assert seeding.derive(0, "augment", 1, 2) != seeding.derive(0, "augment", 12)
