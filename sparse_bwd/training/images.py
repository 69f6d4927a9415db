"""Decoding an image file: whitelisted formats, a size limit that is checked first, one sentence per error."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from sparse_bwd.training.errors import UserError

# Pixels of the largest image that is decoded; a 100-megapixel photograph still passes.
MAX_PIXELS = 120_000_000
# Formats whose decoder runs inside Pillow; EPS, for instance, would start another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(source: Path | IO[bytes], name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The opened, not yet decoded image. UserError if its header cannot be read or promises too many pixels."""

    def opened() -> Image.Image:
        return Image.open(source, formats=FORMATS)

    image = guarded(opened, name)
    if image.width * image.height > max_pixels:
        raise UserError(
            f"The image {name} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}: "
            "make it smaller or take it out of the data."
        )
    return image


def decode(source: Path | IO[bytes], name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as RGB. `name` is what an error calls it. UserError if it is corrupt, unknown or too large."""
    image = open_image(source, name, max_pixels)
    try:
        return guarded(lambda: image.convert("RGB"), name)
    finally:
        image.close()


def guarded(load: Callable[[], Image.Image], name: str) -> Image.Image:
    """`load()` with Pillow's many kinds of failure turned into one UserError that names the image."""
    try:
        # Pillow only warns about images up to twice its own limit; our limit decides, so a warning is no help.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return load()
    except FileNotFoundError as error:
        raise UserError(f"The image {name} does not exist.") from error
    except IsADirectoryError as error:
        raise UserError(f"{name} is a folder, not an image.") from error
    except PermissionError as error:
        raise UserError(f"The image {name} may not be read: change its permissions.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"The image {name} is too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise UserError(f"The image {name} is corrupt or not one of {formats}.") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        MemoryError,
        OverflowError,
        IndexError,
        KeyError,
    ) as error:
        # Pillow's decoders raise all of these on damaged files.
        raise UserError(f"The image {name} is corrupt ({type(error).__name__}: {error}).") from error
