"""Where images come from: a folder, scikit-learn's digits, or a torchvision data set, all asked for by one string."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np

from sparse_bwd.training import seeding
from sparse_bwd.training.errors import UserError, unknown
from sparse_bwd.training.images import MAX_PIXELS, SUFFIXES
from sparse_bwd.training.samples import ArraySamples, DatasetSamples, FileSamples, Samples

# Share of the images that becomes the test set where the data comes without one.
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Source:
    """Images for training and for testing. `classes[k]` is the name of class k; `notes` are for the log."""

    classes: list[str]
    train: Samples
    test: Samples
    notes: str = ""

    def limited(self, train: int | None, test: int | None, seed: int) -> "Source":
        """The same source with at most so many training and test images, in the classes' own proportions."""
        return replace(
            self,
            train=_limit(self.train, train, seed, "--limit-train"),
            test=_limit(self.test, test, seed, "--limit-test"),
        )

    def held_back(self, share: float, seed: int) -> "Source":
        """The same source with this share of every class's training images as its test images; 0: unchanged."""
        if not share:
            return self
        train, held = seeding.split(self.train.targets, share, seed)
        if not held:
            raise UserError(
                "The data has one training image per class, so none can be held back: leave out --validation."
            )
        notes = f"{self.notes}; tested on {share:.0%} of the training images, held back"
        return replace(self, train=self.train.select(train), test=self.train.select(held), notes=notes)


def _limit(samples: Samples, count: int | None, seed: int, option: str) -> Samples:
    if count is None or count >= len(samples):
        return samples
    if count < 1:
        raise UserError(f"{option} is {count}; it must be at least 1.")
    return samples.select(sorted(seeding.stratified_order(samples.targets, seed)[:count]))


@dataclass(frozen=True)
class DataOptions:
    """How to find and split data: `root` and `download` serve torchvision's sets, `split_seed` sets without a split."""

    root: Path = Path("data")
    download: bool = False
    split_seed: int = 0
    max_pixels: int = MAX_PIXELS


def open_source(name: str, options: DataOptions | None = None) -> Source:
    """The data called `name`: an existing folder, else "digits", else a torchvision data set. UserError if neither."""
    options = options or DataOptions()
    folder = Path(name)
    if folder.is_dir():
        return _open_folder(folder, options)
    if name == "digits":
        return _open_digits(options)
    if name in TORCHVISION:
        return _open_torchvision(name, options)
    if "/" in name or "\\" in name or folder.exists():
        raise UserError(f"The data folder {name} does not exist or is not a folder.")
    raise unknown("data set or folder", name, ["digits", *TORCHVISION])


def _open_folder(root: Path, options: DataOptions) -> Source:
    train = root / "train"
    test = next((root / part for part in ("test", "val", "validation") if (root / part).is_dir()), None)
    if not train.is_dir():
        classes = _class_names(root)
        samples = _scan(root, classes, options)
        return _halve(samples, classes, options)
    classes = _class_names(train)
    if test is None:
        samples = _scan(train, classes, options)
        return _halve(samples, classes, options)
    extra = sorted(set(_class_names(test)) - set(classes))
    if extra:
        raise UserError(f"{test} has classes that {train} lacks: {', '.join(extra[:5])}.")
    present = [name for name in classes if (test / name).is_dir()]
    tested = _scan(test, present, options, numbers=[classes.index(name) for name in present])
    return Source(classes, _scan(train, classes, options), tested, f"{train.name} and {test.name} as given")


def _class_names(folder: Path) -> list[str]:
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(names) < 2:
        found = f"one folder, {names[0]}" if names else "no folders"
        hint = f"; did you mean {folder / names[0]}?" if names and _has_folders(folder / names[0]) else "."
        raise UserError(
            f"{folder} must hold one folder of images per class, at least two, but has {found}{hint}"
        )
    return names


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir())


def _scan(
    folder: Path, classes: list[str], options: DataOptions, numbers: list[int] | None = None
) -> FileSamples:
    """All image files of the class folders, by sorted relative path. An empty class is an error."""
    paths: list[Path] = []
    targets: list[int] = []
    for number, name in zip(numbers or range(len(classes)), classes, strict=True):
        inside = [
            path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not inside:
            raise UserError(f"The class folder {folder / name} has no images ({', '.join(SUFFIXES)}).")
        paths += sorted(inside)
        targets += [number] * len(inside)
    return FileSamples(folder, paths, targets, options.max_pixels)


def _halve(samples: Samples, classes: list[str], options: DataOptions) -> Source:
    train, test = seeding.split(samples.targets, TEST_FRACTION, options.split_seed)
    if not test:
        raise UserError(
            "The data has one image per class, so none is left to test on: add images or a test folder."
        )
    note = f"{1 - TEST_FRACTION:.0%} / {TEST_FRACTION:.0%} split per class, split seed {options.split_seed}"
    return Source(classes, samples.select(train), samples.select(test), note)


def _open_digits(options: DataOptions) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The data set digits needs scikit-learn: install sparse-bwd[training].") from error
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    samples = ArraySamples(images, digits.target, "digits")
    return _halve(samples, [str(number) for number in range(10)], options)


@dataclass(frozen=True)
class _Torchvision:
    """Class name in torchvision.datasets and the keyword arguments for its two parts; test None: split by us."""

    cls: str
    train: dict[str, Any]
    test: dict[str, Any] | None


_TRAIN_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_TRAINVAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "trainval"}, {"split": "test"})
_FAKE: dict[str, Any] = {"image_size": (3, 64, 64), "num_classes": 10}

TORCHVISION = {
    "cifar10": _Torchvision("CIFAR10", *_TRAIN_FLAG),
    "cifar100": _Torchvision("CIFAR100", *_TRAIN_FLAG),
    "mnist": _Torchvision("MNIST", *_TRAIN_FLAG),
    "fashionmnist": _Torchvision("FashionMNIST", *_TRAIN_FLAG),
    "kmnist": _Torchvision("KMNIST", *_TRAIN_FLAG),
    "usps": _Torchvision("USPS", *_TRAIN_FLAG),
    "flowers102": _Torchvision("Flowers102", *_SPLIT),
    "food101": _Torchvision("Food101", *_SPLIT),
    "oxfordiiitpet": _Torchvision("OxfordIIITPet", *_TRAINVAL),
    "dtd": _Torchvision("DTD", *_SPLIT),
    "fgvcaircraft": _Torchvision("FGVCAircraft", *_TRAINVAL),
    "gtsrb": _Torchvision("GTSRB", *_SPLIT),
    "stl10": _Torchvision("STL10", *_SPLIT),
    "svhn": _Torchvision("SVHN", *_SPLIT),
    "eurosat": _Torchvision("EuroSAT", {}, None),
    # Random noise of ten classes: 256 images to train on, 64 to test on, for trying a set-up without any data.
    "fakedata": _Torchvision("FakeData", _FAKE | {"size": 256}, _FAKE | {"size": 64, "random_offset": 256}),
}


def _open_torchvision(name: str, options: DataOptions) -> Source:
    from torchvision import datasets

    entry = TORCHVISION[name]
    cls = getattr(datasets, entry.cls)

    def build(part: dict[str, Any]) -> Any:
        if name == "fakedata":
            return cls(**part)
        return _build(lambda: cls(str(options.root), download=options.download, **part), name, options)

    train = build(entry.train)
    samples = DatasetSamples(train, f"{name} training")
    classes = _dataset_classes(train, samples.targets)
    if entry.test is None:
        return _halve(samples, classes, options)
    return Source(
        classes, samples, DatasetSamples(build(entry.test), f"{name} test"), "torchvision's own split"
    )


def _build(make: Callable[[], Any], name: str, options: DataOptions) -> Any:
    try:
        return make()
    except URLError as error:
        raise UserError(f"The data set {name} could not be downloaded: {error.reason}.") from error
    except (RuntimeError, FileNotFoundError) as error:
        if options.download:
            raise UserError(
                f"The data set {name} could not be prepared in {options.root}: {error}"
            ) from error
        raise UserError(
            f"The data set {name} is not in {options.root}: give its place with --data-root, or --download to fetch it."
        ) from error


def _dataset_classes(dataset: Any, targets: list[int]) -> list[str]:
    classes = getattr(dataset, "classes", None)
    return [str(c) for c in classes] if classes else [str(number) for number in range(max(targets) + 1)]
