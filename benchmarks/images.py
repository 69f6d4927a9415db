"""Image folders, as they are or out of an archive."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from sparse_bwd.training import UserError


def unpack(archive: Path, target: Path) -> Path:
    """`archive` itself if it is a folder, else what the zip holds: its one top folder, if it has but one."""
    if archive.is_dir():
        return archive
    if not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive} is neither a folder of images nor a zip archive of one.") from error
        partial.rename(target)
    inside = [path for path in target.iterdir() if path.is_dir()]
    return inside[0] if len(inside) == 1 else target
