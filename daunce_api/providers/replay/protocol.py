"""Which requests and fields a recording can hold: a number that grows when a run sends something new.

Replaying an older recording leaves out what it does not know, and names it as not checked. Live runs and new recordings
never leave anything out.

No replay compares its store with the provider's list of jobs: recorded lists show jobs in the order of the recording,
which is not the order in which a replay submits them.
"""

from __future__ import annotations

PROTOCOL = 2
"""What this version sends."""

SINCE: dict[int, tuple[str, ...]] = {
    2: (
        "the run's sequence number in each job",
        "token ids of scored prompts",
        "the endpoint's test on fine-tunes",
    )
}
"""What each version added: none of it changes a loss."""


def not_checked(protocol: int) -> tuple[str, ...]:
    """What a replay of a recording of ``protocol`` leaves out, in words.

    Example:
        >>> not_checked(PROTOCOL)
        ("the provider's list of this run's jobs",)
        >>> not_checked(1)[-1]
        "the endpoint's test on fine-tunes"
    """
    newer = (name for version, names in sorted(SINCE.items()) if version > protocol for name in names)
    return ("the provider's list of this run's jobs", *newer)
