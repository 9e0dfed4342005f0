"""Errors that no retry can help: this process, or this machine, has run out of something."""

from __future__ import annotations

import errno
import os

_LIMITS = {
    errno.EMFILE: "`ulimit -n 1024` raises it",
    errno.ENFILE: "it is the whole system's",
    errno.ENOMEM: "",
    errno.ENOSPC: "",
    errno.EDQUOT: "",
}


def exhausted(error: BaseException | None) -> str | None:
    """What has run out, where that is at the bottom of an error; None where it is not.

    Example:
        >>> exhausted(OSError(24, "Too many open files"))
        'Too many open files, a limit of this machine (`ulimit -n 1024` raises it)'
        >>> exhausted(ConnectionRefusedError(111, "Connection refused")) is None
        True
    """
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        for number, advice in _LIMITS.items():
            words = os.strerror(number)
            if isinstance(one, OSError | ImportError) and (getattr(one, "errno", None) == number or words in str(one)):
                return f"{words}, a limit of this machine{f' ({advice})' if advice else ''}"
        waiting += [one.__cause__, one.__context__]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return None
