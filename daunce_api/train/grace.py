"""Not yet: a job, file or model that was just made may be invisible for minutes, and that is no failure."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from .._util.clock import Clock
from .._util.retry import duration
from ..errors import RejectedError

_LONGEST_PAUSE = 30.0
_MISSING = re.compile(
    r"not (?:yet )?(?:be )?(?:found|exist|ready|available|processed|visible|known)|no such|does ?n[o'’]t exist"
    r"|unknown|invalid|still (?:being )?process",
    re.IGNORECASE,
)
_FILE = re.compile(r"\b(?:training[_ ]?)?files?\b", re.IGNORECASE)


def names_missing(error: RejectedError, *ids: str) -> bool:
    """Whether a refused job creation says that its training file, or one of ``ids``, is not there."""
    text = str(error)
    if error.status not in (None, 400, 404, 409, 422) or _MISSING.search(text) is None:
        return False
    return any(name in text for name in ids) or _FILE.search(text) is not None


class Grace:
    """The grace periods of one provider's new things, each from the first time that it was not found.

    Counted from there and not from its creation, so that a run that was interrupted in between waits as well.
    """

    def __init__(self, seconds: float, clock: Clock, say: Callable[[str], None]) -> None:
        self.seconds = seconds
        self._clock = clock
        self._say = say
        self._since: dict[str, float] = {}

    async def wait(self, subject: str, why: object, *, sleep: Callable[[float], Awaitable[None]]) -> bool:
        """Wait before the next look at ``subject``; False, at once, when its grace period is over."""
        now = self._clock.now()
        waited = now - self._since.get(subject, now)
        if waited >= self.seconds:
            return False
        if subject not in self._since:
            self._since[subject] = now
            self._say(
                f"{subject} is not visible yet ({why}). The provider may need minutes; it is looked for again for "
                f"{duration(self.seconds)} before it counts as lost."
            )
        await sleep(min(max(1.0, waited / 2), _LONGEST_PAUSE, self.seconds - waited))
        return True

    def visible(self, subject: str) -> None:
        """``subject`` has been found."""
        if self._since.pop(subject, None) is not None:
            self._say(f"{subject} is visible now.")
