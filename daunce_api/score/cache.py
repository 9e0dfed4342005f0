"""Where a model's log-probabilities are already: which runs of this user hold them.

For each model of a paid endpoint a small file in the user's cache folder names the run folders that hold its scores. It
keeps no scores itself: what a run holds is read from that run, with its checksums, and what was set aside there is not
found. Of endpoints and models it holds hashes, of runs their folders; no text and no secret. Only remote endpoints use
it, where a model's name stands for the same weights for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from .._util.log import logger
from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import StoreError
from ..providers.base import TokenScores
from ..providers.registry import scoring_address
from ..store import RunStore

FOLDER = "scored"
_LINE = TypeAdapter(tuple[str, int, int])
"""Run folder, member, checkpoint."""


def open_cache(config: RunConfig) -> ScoredCache | None:
    """The user's cache for the config's endpoint, or None: it is off (``scoring.cache: false``), or the endpoint is
    this machine, where nothing is paid and a model's name may stand for other weights tomorrow."""
    address = scoring_address(config) if config.scoring.cache else None
    return None if address is None else ScoredCache(user_cache_path("daunce"), address)


class ScoredCache:
    """Runs that hold scores of one endpoint's models, a line each; several processes may add lines.

    A line that is damaged is passed over. A folder that cannot be read or written costs the run nothing but what it
    would have saved.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder / FOLDER
        self._address = address

    def lookup(
        self, fingerprint: str, model: str, examples: Sequence[EncodedExample], *, besides: Path | None = None
    ) -> dict[str, TokenScores]:
        """What other runs than the one in ``besides`` hold of these examples, by ``EncodedExample.key``."""
        found: dict[str, TokenScores] = {}
        for run_dir, member, checkpoint in self._noted(self._path(fingerprint, model)):
            if besides is not None and Path(run_dir) == besides.resolve():
                continue
            missing = [e for e in examples if e.key not in found]
            with contextlib.suppress(StoreError), RunStore.open(run_dir, read_only=True) as store:
                if missing and store.scores.scored_with == fingerprint:
                    ids = store.scores.find_ids(missing)
                    answers = store.scores.load_some(ids, member, 0, checkpoint).scores()
                    found |= {e.key: answers[i] for i, e in zip(ids.tolist(), missing, strict=True) if i in answers}
        return found

    def note(self, fingerprint: str, model: str, run_dir: Path, member: int, checkpoint: int) -> None:
        """A run holds scores of a model."""
        path, row = self._path(fingerprint, model), (str(run_dir.resolve()), member, checkpoint)
        if row in self._noted(path):
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # one write, after whatever a killed process or a full disk left half written
                file.write(b"\n" + _LINE.dump_json(row) + b"\n")
        except (OSError, PydanticSerializationError) as error:  # the latter: a folder's name that is not Unicode
            logger.warning("the cache of scores could not be written: %s", error)

    def _noted(self, path: Path) -> list[tuple[str, int, int]]:
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("the cache of scores could not be read: %s", error)
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValidationError):
                rows.append(_LINE.validate_json(line))
        return rows

    def _path(self, fingerprint: str, model: str) -> Path:
        return self._folder / hashlib.sha256("\0".join((self._address, fingerprint, model)).encode()).hexdigest()
