"""Which requests and fields a recording can hold: a number that grows when a run sends something new.

Replaying an older recording leaves out what it does not know, and names it as not checked. Live runs and new recordings
never leave anything out.
"""

from __future__ import annotations

PROTOCOL = 2
"""What this version sends."""

SINCE: dict[int, tuple[str, ...]] = {
    2: (
        "the provider's list of this run's jobs",
        "the run's sequence number in each job",
        "token ids of scored prompts",
        "the endpoint's test on fine-tunes",
    )
}
"""What each version added: none of it changes a loss."""


def not_checked(protocol: int) -> tuple[str, ...]:
    """What a recording of ``protocol`` does not hold, in words.

    Example:
        >>> not_checked(PROTOCOL)
        ()
        >>> not_checked(1)[0]
        "the provider's list of this run's jobs"
    """
    return tuple(name for version, names in sorted(SINCE.items()) if version > protocol for name in names)
