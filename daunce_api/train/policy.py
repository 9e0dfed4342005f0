"""The waiting times of fine-tuning jobs."""

from __future__ import annotations

from dataclasses import dataclass

from .._util.retry import RetryPolicy

JOB_RETRIES = RetryPolicy(first=1.0, longest=60.0, attempts=100, total=3600.0)
"""Requests about jobs, files and models: an outage of an hour is waited for; a longer Retry-After parks the run."""


REACH_RETRIES = RetryPolicy(first=1.0, longest=20.0, attempts=8, total=120.0)
"""The first request to the jobs route: a route that never works is distinguished from an outage within two minutes."""


@dataclass(frozen=True, slots=True)
class PollPolicy:
    """How a submitted job is watched, in seconds.

    It is read after ``first``, then whenever a tenth of its age has passed, at most ``longest`` apart; each pause is
    spread by up to a fifth. ``job_timeout``: a job that takes longer is cancelled and its attempt counts as failed;
    time in a queue counts, unless the queue is for the user's own machines. ``withheld``: how long a finished job may
    take to show its model.
    """

    first: float = 0.5
    longest: float = 60.0
    job_timeout: float = 86_400.0
    withheld: float = 600.0
