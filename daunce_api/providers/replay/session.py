"""A recording on disk, and the session that writes or replays one.

DIR/recording.json   what it is: ``server``, ``run_key``, versions, number of exchanges, whether the run ended well
DIR/cassette.json    the exchanges, one a line
DIR/SHA256SUMS       checksums of both (``sha256sum -c`` reads it)

Replaying a recording of an earlier protocol leaves out what it does not know, and names it as not checked. Live runs
and new recordings never leave anything out. No replay compares its store with the provider's list of jobs: recorded
lists show jobs in the order of the recording, which is not the order in which a replay submits them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..._util.clock import Clock, InstantClock, SystemClock
from ..._util.files import replacing, writing
from ...errors import MissingExtraError, ReplayError

if TYPE_CHECKING:
    from .tape import Tape

LOCAL: Literal["local emulator"] = "local emulator"
LIVE: Literal["live"] = "live"

CASSETTE, LABEL, SUMS = "cassette.json", "recording.json", "SHA256SUMS"
_SHOWN = 3
PROTOCOL = 2
"""Which requests and fields this version sends: a number that grows when a run sends something new."""

SINCE: dict[int, tuple[str, ...]] = {
    2: (
        "the run's sequence number in each job",
        "token ids of scored prompts",
        "the endpoint's test on fine-tunes",
    )
}
"""What each version added: none of it changes a loss."""


class Label(BaseModel):
    """``recording.json``."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    protocol: int = Field(1, ge=1)
    server: Literal["local emulator", "live"]
    run_key: str = Field(pattern=r"^[0-9a-f]{4,64}$")
    daunce_api: str
    vcrpy: str
    exchanges: int = Field(ge=0)
    complete: bool


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


class Session:
    """Recording or replay of one run; a context manager around everything that sends requests."""

    def __init__(self, folder: Path, *, run_key: str, label: Label | None) -> None:
        """Use :func:`record` or :func:`replay`."""
        self._folder = folder
        self._label = label
        self._context: Any = None
        self._tape: Tape | None = None
        self.run_key = run_key
        """Names the run at the provider; to be given to a new run's store."""
        self.clock: Clock = InstantClock() if label is not None else SystemClock()
        """The clock of the run: a replay waits for nothing."""

    @property
    def replaying(self) -> bool:
        """True where requests are answered from the folder: no network, no key."""
        return self._label is not None

    @property
    def replayed(self) -> int | None:
        """The protocol of the recording that is replayed; None where requests are really sent."""
        return None if self._label is None else self._label.protocol

    @property
    def not_checked(self) -> tuple[str, ...]:
        """Checks that a replay leaves out."""
        return () if self._label is None else not_checked(self._label.protocol)

    def check_run(self, run_key: str) -> None:
        """Raises ReplayError where the run has another key, since a session goes with a new run only."""
        if run_key != self.run_key:
            doing = "replayed into" if self.replaying else "recorded from"
            raise ReplayError(
                f"this run folder was started before, and a recording can only be {doing} a new run. Nothing was sent "
                "or changed. Set run_dir to a new folder, or run without the recording."
            )

    def belongs_to(self, run_key: str) -> None:
        """Record or replay what an existing run is asked. Raises ReplayError where another run was recorded."""
        if self.replaying and run_key != self.run_key:
            raise ReplayError(
                "this recording is of another run. Nothing was sent or changed. Replay the recording of this run into "
                "a new folder first, then the recording of what it was asked."
            )
        self.run_key = run_key

    def __enter__(self) -> Self:
        from .tape import open_tape

        if not self.replaying:
            with writing(self._folder):  # now, not when everything that is to be recorded has been paid for
                self._folder.mkdir(parents=True, exist_ok=True)
        self._context = open_tape(self._folder / CASSETTE, recording=not self.replaying)
        self._tape = self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, tape = self._context, self._tape
        self._context = self._tape = None
        if context is None or tape is None:
            return
        with writing(self._folder / CASSETTE):
            context.__exit__(kind, error, trace)
        if not self.replaying:
            self._seal(tape, complete=error is None)
        elif error is None and (left := tape.unplayed()):
            shown = "; ".join(left[:_SHOWN]) + ("; ..." if len(left) > _SHOWN else "")
            raise ReplayError(
                f"the run ended without making {len(left)} of {len(tape)} recorded requests ({shown}), so it was not "
                "the recorded run. What it computed is in the run folder; do not take it for the recorded result."
            )

    def _seal(self, tape: Tape, *, complete: bool) -> None:
        from .scrub import LOCAL_HOST

        local = all(request.host == LOCAL_HOST for request in tape.requests)
        label = Label(
            server=LOCAL if local else LIVE,
            run_key=self.run_key,
            protocol=PROTOCOL,
            daunce_api=version("daunce-api"),
            vcrpy=version("vcrpy"),
            exchanges=len(tape),
            complete=complete,
        )
        cassette = self._folder / CASSETTE
        if not cassette.exists():  # vcrpy writes no file where nothing was sent
            cassette.write_text('{"version":1,"interactions":[]}\n', encoding="utf-8")
        with replacing(self._folder / LABEL) as part:
            part.write_text(label.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with replacing(self._folder / SUMS) as part:
            part.write_text("".join(f"{_sha256(self._folder / name)}  {name}\n" for name in (CASSETTE, LABEL)))


def record(folder: str | Path) -> Session:
    """A session that writes a recording into a new folder.

    What is written has no credentials in it: headers go through allow-lists, and the keys that were sent are removed
    from answers. Raises ReplayError where the folder holds a recording already, and MissingExtraError.
    """
    _require_vcr()
    path = Path(folder)
    if any((path / name).exists() for name in (CASSETTE, LABEL, SUMS)):
        raise ReplayError(
            f"{path} holds a recording already; nothing was run. Delete it, or choose another folder for --record."
        )
    return Session(path, run_key=secrets.token_hex(4), label=None)


def replay(folder: str | Path) -> Session:
    """A session that answers from a recording.

    Raises ReplayError where there is none, or where its files were changed after recording; MissingExtraError.
    """
    _require_vcr()
    path = Path(folder)
    if not (path / SUMS).is_file():
        raise ReplayError(f"{path} holds no recording ({SUMS} is not there). `daunce run --record DIR` makes one.")
    label = _checked(path)
    return Session(path, run_key=label.run_key, label=label)


def _checked(path: Path) -> Label:
    expected = {}
    for line in (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    for name in (CASSETTE, LABEL):
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise ReplayError(f"{path / name} cannot be read ({error.strerror}); nothing was run.") from error
        if expected.get(name) != actual:
            raise ReplayError(
                f"{path / name} is not the file that was recorded: its checksum differs, so it was edited or damaged. "
                "Nothing was run. Take the recording from where it came from, or record again."
            )
    try:
        label = Label.model_validate(json.loads((path / LABEL).read_text(encoding="utf-8")))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ReplayError(f"{path / LABEL} is not a label of this format; nothing was run. Record again.") from error
    if label.protocol > PROTOCOL:
        raise ReplayError(
            f"{path} was recorded by a newer version (protocol {label.protocol}, this one knows {PROTOCOL}); nothing "
            "was run. Upgrade daunce-api."
        )
    return label


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_vcr() -> None:
    from importlib.util import find_spec

    if find_spec("vcr") is None:
        raise MissingExtraError("recording and replaying", "replay")
