"""Errors that a user can act on: one clear sentence each, exit code 2 on the command line."""

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; its text is one sentence that says what and how."""


class Diverged(UserError):
    """Training left the finite numbers; the last checkpoint on disk is still good."""


class Stopped(Exception):
    """Training was asked to stop (Ctrl-C or SIGTERM) and wrote a checkpoint. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


# The disk is full, a quota is used up, or a file would pass the size that the process may write.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_no_space(error: OSError) -> bool:
    """Whether a write failed for lack of room."""
    return error.errno in _NO_SPACE


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that means nothing, with the nearest known names."""
    names = list(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if near:
        hint = "the nearest names are " + ", ".join(by_lower[word] for word in near)
    else:
        hint = "known names are " + ", ".join(sorted(names)[:12]) + (", ..." if len(names) > 12 else "")
    return UserError(f"There is no {kind} called '{name}'; {hint}.")
