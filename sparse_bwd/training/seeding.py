"""Random numbers as a function of what they are for, so that a resumed run needs to remember none of them."""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence

import torch


def derive(seed: int, *parts: object) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "augment", epoch, index)`; stable across machines."""
    text = ":".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the body on torch's CPU generator and Python's `random`, both started from `seed`; then puts them back.

    torchvision draws from the first, timm from the second.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def permutation(count: int, seed: int) -> list[int]:
    """A random order of range(count), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def stratified_order(targets: Sequence[int], seed: int) -> list[int]:
    """A random order of all samples of which every prefix holds the classes in nearly their true proportions.

    A sample's place is its rank within its class divided by the size of the class; ties are broken at random.
    """
    order = permutation(len(targets), seed)
    sizes: dict[int, int] = {}
    for target in targets:
        sizes[target] = sizes.get(target, 0) + 1
    seen: dict[int, int] = {}
    keyed = []
    for tie, index in enumerate(order):
        rank = seen[targets[index]] = seen.get(targets[index], 0) + 1
        keyed.append(((rank - 0.5) / sizes[targets[index]], tie, index))
    return [index for _, _, index in sorted(keyed)]


def split(targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Two sorted lists of indices: every class gives round(fraction * size) samples, at least one, to the second.

    A class with a single sample stays in the first.
    """
    by_class: dict[int, list[int]] = {}
    for index in permutation(len(targets), seed):
        by_class.setdefault(targets[index], []).append(index)
    second: list[int] = []
    for members in by_class.values():
        take = min(max(1, round(fraction * len(members))), len(members) - 1)
        second += members[:take]
    chosen = set(second)
    return [i for i in range(len(targets)) if i not in chosen], sorted(second)
