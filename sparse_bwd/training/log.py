"""The JSON-lines log of a run: one object per line, never torn, never doubled by a resume."""

import json
import os
import time
from pathlib import Path
from typing import Any

from sparse_bwd.training.errors import UserError


class JsonLog:
    """Appends lines to `path`. `size` is the length in bytes of the whole lines written so far.

    Args:
        keep: length to go on from: what was written after the checkpoint that is resumed is cut off. 0: from nothing.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115 -- closed by close()
        # Shorter than `keep`, or not ending a line there, only if someone edited the file since.
        self.size = self._file.read(keep).rfind(b"\n") + 1
        self._file.truncate(self.size)

    def write(self, event: str, **fields: Any) -> None:
        """Adds one line. If it does not fit on the disk, none of it stays, and the OSError is passed on."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}).encode() + b"\n"
        self._file.seek(self.size)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self._file.truncate(self.size)
            raise
        self.size += len(line)

    def sync(self) -> None:
        """Waits until the lines are on the disk: a checkpoint that counts them must not get there first."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class SilentLog(JsonLog):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, event: str, **fields: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. UserError if the file is missing or is not a log."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"The log {path} cannot be read: {error}.") from error
