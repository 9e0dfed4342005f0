"""Every exception that daunce_api raises on purpose.

    DaunceError
    ├── ConfigurationError(ValueError)      the config file or an argument is wrong
    ├── DataError(ValueError)               the training or test data is wrong; ``.problems`` lists every place
    ├── MissingExtraError(ImportError)      an optional part is not installed
    ├── CapabilityError(ValueError)         this backend cannot do what the data needs
    ├── BudgetError(RuntimeError)           the plan, or the next job, would exceed ``budget.max_usd``
    ├── StoreError(RuntimeError)            a run folder cannot be used
    │   ├── RunLockedError                  another process is working on it; ``.pid``
    │   ├── RunChangedError                 config or data differ from what the run was started with
    │   ├── StoreCorruptError               a checksum or the schema does not match
    │   └── UnknownJobsError                the provider has jobs of this run that its folder does not know; ``.jobs``
    ├── ProviderError(RuntimeError)         the provider answered with an error
    │   ├── TransientError                  worth repeating; ``.retry_after`` seconds or None
    │   ├── AmbiguousSubmitError            no answer to a submit: the job may exist, look it up
    │   ├── RejectedError                   this one job or request will never be accepted
    │   ├── DailyLimitError                 a daily quota is used up: go on in some hours
    │   ├── StopError                       no request can succeed: credentials, permission, money
    │   │   └── HeldJobError                a job may be the run's, but the provider shows it as another one
    │   └── ContractError(ValueError)       an answer breaks the log-probability contract
    │       └── MembersAlikeError           fine-tunes answer alike: they are not what is served; ``.members``
    ├── NotEnoughMembersError(RuntimeError) too few members are scored for attribution
    ├── TrainingCancelledError(RuntimeError) a local fine-tune was stopped
    └── ReplayError(RuntimeError)           a recording does not cover what the run asks for

Each class says with ``exit_code`` how the command line ends. Every message states what happened, what was kept
and what to do next. All of them survive pickling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DaunceError(Exception):
    """Base of all errors of this package; ``except DaunceError`` catches them and no programming error."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls cls(*args), which loses keyword attributes or fails where they are required.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[DaunceError], args: tuple[Any, ...], attributes: dict[str, Any]) -> DaunceError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigurationError(DaunceError, ValueError):
    """The config file, a command-line option or an argument is wrong."""

    exit_code = 2


class DataError(DaunceError, ValueError):
    """The data cannot be used. ``problems`` holds one line a problem, each with file and line."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  {p}" for p in self.problems)]))


class MissingExtraError(DaunceError, ImportError):
    """An optional part of the package is needed and not installed."""

    exit_code = 2

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what} needs an optional part: pip install 'daunce-api[{extra}]'")


class CapabilityError(DaunceError, ValueError):
    """The backend cannot do what the data or the config needs; the message names an alternative."""

    exit_code = 3


class BudgetError(DaunceError, RuntimeError):
    """Going on would spend more than ``budget.max_usd`` allows, or a price that the cap needs is unknown."""

    exit_code = 3


class StoreError(DaunceError, RuntimeError):
    """A run folder cannot be read or written."""

    exit_code = 4


class RunLockedError(StoreError):
    """Another process works on this run."""

    def __init__(self, message: str, pid: int | None = None) -> None:
        self.pid = pid
        super().__init__(message)


class RunChangedError(StoreError):
    """The config or the data are not those that the run was started with."""


class StoreCorruptError(StoreError):
    """What is stored was damaged or edited: a checksum or the schema does not match."""


class UnknownJobsError(StoreError):
    """The provider has jobs of this run that its folder does not know: it is a copy, or lost what was stored last.
    ``jobs`` are their ids."""

    def __init__(self, message: str, jobs: Sequence[str] = ()) -> None:
        self.jobs = tuple(jobs)
        super().__init__(message)


class ProviderError(DaunceError, RuntimeError):
    """The provider answered with an error. ``status`` is the HTTP status of the answer, if there was one."""

    exit_code = 5
    status: int | None = None


class TransientError(ProviderError):
    """A rate limit, a server fault or a broken connection: the same request may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class AmbiguousSubmitError(ProviderError):
    """A submit got no usable answer. The job may or may not exist; it has to be looked up before any repeat."""


class RejectedError(ProviderError):
    """The provider will never accept this job or request as it is (a bad file, a withheld model)."""


class DailyLimitError(ProviderError):
    """A daily quota is used up; the run is resumable, run the same command again in some hours."""

    exit_code = 6


class StopError(ProviderError):
    """No further request can succeed until a person acts (credentials, permission, credit)."""


class HeldJobError(StopError):
    """A job may be the run's, but the provider shows it as another one: it is neither used nor submitted again."""


class ContractError(ProviderError, ValueError):
    """An answer does not hold the log-probabilities that were requested; nothing of it is used."""


class MembersAlikeError(ContractError):
    """Answers of fine-tunes that must differ do not: the endpoint serves another model for them. ``members`` are those
    concerned; None says that it is all of them."""

    def __init__(self, message: str, members: Sequence[int] | None = None) -> None:
        self.members = None if members is None else tuple(members)
        super().__init__(message)


class NotEnoughMembersError(DaunceError, RuntimeError):
    """Fewer members are trained and scored than attribution needs."""

    exit_code = 7


class TrainingCancelledError(DaunceError, RuntimeError):
    """A fine-tune on this machine was stopped; it left no adapter."""


class ReplayError(DaunceError, RuntimeError):
    """A recording is missing, damaged, or does not hold a request that the run makes."""

    exit_code = 8
