"""Labelled images that are decoded one at a time: files, arrays, torchvision data sets, and subsets of them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparse_bwd.training.errors import UserError
from sparse_bwd.training.images import decode, guarded, open_image

# Sets of files up to this many bytes are decoded once before the run starts; of larger ones only the headers are read.
CHECK_WHOLE_BYTES = 256 * 2**20


class Samples(ABC):
    """`len()` images; `targets[i]` is the class number of image i, `load(i)` the decoded RGB image."""

    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index` as RGB. UserError, naming the image, if it cannot be decoded."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call image `index` in a message and in the fingerprint of the data."""

    def check(self) -> None:  # noqa: B027 -- optional
        """Raises UserError for the first image that is seen to be unreadable without training on it."""

    def select(self, keep: Sequence[int]) -> "Subset":
        """The samples at the positions `keep`, in that order."""
        return Subset(self, keep)

    def fingerprint(self) -> str:
        """A short hash of names and labels: two runs with the same one saw the same data in the same order."""
        digest = hashlib.blake2b(digest_size=8)
        for index, target in enumerate(self.targets):
            digest.update(f"{self.name(index)}\0{target}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class FileSamples(Samples):
    """Image files below `root`, which only keeps names in messages short and fingerprints independent of the place."""

    def __init__(self, root: Path, paths: Sequence[Path], targets: Sequence[int], max_pixels: int) -> None:
        self.root, self.paths, self.targets = root, list(paths), list(targets)
        self.max_pixels = max_pixels

    def load(self, index: int) -> Image.Image:
        return decode(self.paths[index], str(self.paths[index]), self.max_pixels)

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def check(self) -> None:
        check_files(self, range(len(self)))


class Subset(Samples):
    """Some samples of another set."""

    def __init__(self, parent: Samples, keep: Sequence[int]) -> None:
        self.parent, self.keep = parent, list(keep)
        self.targets = [parent.targets[index] for index in self.keep]

    def load(self, index: int) -> Image.Image:
        return self.parent.load(self.keep[index])

    def name(self, index: int) -> str:
        return self.parent.name(self.keep[index])

    def select(self, keep: Sequence[int]) -> "Subset":
        return Subset(self.parent, [self.keep[index] for index in keep])

    def check(self) -> None:
        if isinstance(self.parent, FileSamples):
            check_files(self.parent, self.keep)


class ArraySamples(Samples):
    """Images in memory: uint8 [N, H, W] (grey) or [N, H, W, 3]."""

    def __init__(
        self, images: np.ndarray[Any, np.dtype[np.uint8]], targets: Sequence[int], name: str
    ) -> None:
        self.images, self.targets, self.label = images, [int(target) for target in targets], name

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.label} image {index}"


class DatasetSamples(Samples):
    """A torchvision data set, whose items are (image, class number)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.label = dataset, name
        self.targets = _targets(dataset)

    def load(self, index: int) -> Image.Image:
        def item() -> Image.Image:
            image: Image.Image = self.dataset[index][0]
            return image.convert("RGB")

        return guarded(item, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.label} image {index}"


def check_files(samples: FileSamples, keep: Sequence[int]) -> None:
    """Decodes the files at positions `keep`, or only their headers where decoding would take long."""
    paths = [samples.paths[index] for index in keep]
    try:
        whole = sum(path.stat().st_size for path in paths) <= CHECK_WHOLE_BYTES
    except OSError as error:
        raise UserError(f"The image {error.filename} cannot be read: {error.strerror}.") from error

    def check(path: Path) -> None:
        if whole:
            decode(path, str(path), samples.max_pixels).close()
        else:
            open_image(path, str(path), samples.max_pixels).close()

    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in pool.map(check, paths):
            pass


def _targets(dataset: Any) -> list[int]:
    """Class numbers of a torchvision data set, without decoding where it keeps a list of them."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    return [int(dataset[index][1]) for index in range(len(dataset))]
