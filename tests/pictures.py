"""Small image folders for tests, good and bad."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def make_folder(
    root: Path, per_class: int = 10, classes: tuple[str, ...] = ("ant", "bee"), size: int = 20
) -> Path:
    """`root`/CLASS/N.jpg: every class has a brightness of its own, with noise."""
    noise = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            level = 255 * (number + 0.5) / len(classes)
            pixels = np.clip(level + noise.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.jpg")
    return root


def garbage(path: Path) -> Path:
    """A file that is no image."""
    path.write_bytes(b"this is not a picture" * 20)
    return path


def truncated(path: Path) -> Path:
    """A JPEG with a good header, cut off in the middle of its pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:4000])
    return path


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path
