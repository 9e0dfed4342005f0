"""``Attribution``: the losses of an ensemble and everything that can be asked of them.

It holds two loss matrices and the examples, not the N x M scores: those are computed where they are needed. It can be
saved, loaded and looked at without the run, the provider or a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import core
from .core.losses import Reduction
from .core.uncertainty import significance_threshold
from .dataset import Dataset
from .errors import ConfigurationError, NotEnoughMembersError, StoreCorruptError

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Side = Literal["train", "test"]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Token log-probabilities of every member, for token-level views.

    ``pieces`` holds the completion tokens of each example as printable strings, ``logprobs`` one (K, T_i) array an
    example in nats, NaN where a member has not scored it.
    """

    pieces: tuple[tuple[str, ...], ...]
    logprobs: tuple[Floats, ...]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of N training examples to M test examples, from K members.

    Sign: a positive score means that the training example helps: up-weighting it lowers the test example's loss. Unit
    of the default loss: nats per completion token; see :func:`daunce_api.core.scores` for the unit of each estimator.

    Attributes:
        train, test: the examples, N and M of them.
        members: (K,) member numbers, in the order of the rows below.
        train_loss_KN, test_loss_KM: per-example losses in nats, NaN where not scored.
        inclusion_KN: (K, N) bool, whether an example was in a member's subset.
        estimator: a registry name or "auto".
        noise: measured scoring noise of one loss, nats (standard deviation), or None.
        rho: for members started from the target, see METHOD item 6 in :mod:`daunce_api.core`; else None.
        loss: how token losses became example losses, "mean" (nats per token) or "sum".
        censored: share of scored losses that are lower bounds.
        tokens: token tables by side ("train", "test"), where they were kept.
        facts: provider, model and other plain facts of the run, for display.
    """

    train: Dataset
    test: Dataset
    members: tuple[int, ...]
    train_loss_KN: Floats
    test_loss_KM: Floats
    inclusion_KN: NDArray[np.bool_]
    estimator: str = "auto"
    noise: float | None = None
    rho: float | None = None
    loss: Reduction = "mean"
    censored: float = 0.0
    tokens: Mapping[Side, TokenTable] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def with_estimator(self, estimator: str) -> Attribution:
        """The same losses under another estimator."""
        return replace(self, estimator=estimator)

    @cached_property
    def choice(self) -> core.Choice:
        """The estimator in use and why it was chosen."""
        members = core.member_losses(self.train_loss_KN, self.test_loss_KM, self.inclusion_KN)
        return core.choose(members, self.estimator, core.Setting(self.noise, self.rho))

    @cached_property
    def self_lds(self) -> core.SelfLDS | None:
        """Estimated quality of the ranking (see :func:`daunce_api.core.self_lds`); None with too few members."""
        try:
            return core.self_lds(
                self.train_loss_KN,
                self.test_loss_KM,
                self.inclusion_KN,
                estimator=self.estimator,
                noise=self.noise,
                rho=self.rho,
            )
        except NotEnoughMembersError:
            return None

    def scores_NM(self) -> NDArray[Any]:
        """(N, M) scores; positive = helpful."""
        return core.scores(
            self.train_loss_KN, self.test_loss_KM, self.inclusion_KN, self.estimator, noise=self.noise, rho=self.rho
        )

    def scores(self, by: Literal["source"] | None = None) -> pd.DataFrame:
        """Scores as a table: rows are training ids (or sources, whose score is the sum over their examples), columns
        test ids; positive = helpful."""
        import pandas as pd

        table = pd.DataFrame(self.scores_NM(), index=pd.Index(self.train.ids, name="train"), columns=self.test.ids)
        return table if by is None else table.groupby(self.labels("train")).sum().rename_axis("source")

    def labels(self, side: Side) -> list[str]:
        """The source of each example; "(none)" where it has none."""
        return [source if source is not None else "(none)" for source in getattr(self, side).sources]

    def top(
        self,
        test: str,
        k: int = 10,
        *,
        opponents: bool = False,
        question: core.Question = "attribution",
        fdr: float | None = None,
    ) -> pd.DataFrame:
        """The k strongest proponents (or opponents) of a test example.

        Columns: ``rank``, ``id``, ``source``, ``score`` (positive = helpful), ``stderr``, ``low``, ``high`` (95 %),
        ``z``, ``distinguishable`` (from zero: by itself at 5 %, or with a false-discovery rate ``fdr`` over all
        pairs), ``prompt``, ``completion``. ``DataFrame.attrs`` holds ``estimator``, ``why`` and ``question``.

        Raises DataError for an unknown test id, and what :func:`daunce_api.core.top` raises.
        """
        import pandas as pd

        j = self.test.position(test)
        ranking = self.ranking(k, opponents=opponents, question=question, fdr=fdr, columns=[j])
        rows = []
        for rank in range(ranking.index_Mk.shape[1]):
            i = int(ranking.index_Mk[0, rank])
            if i < 0:
                break
            example = self.train[i]
            rows.append(
                {
                    "rank": rank + 1,
                    "id": example.id,
                    "source": example.source,
                    **ranking_row(ranking, 0, rank),
                    "prompt": example.prompt_text(),
                    "completion": example.completion_text(),
                }
            )
        table = pd.DataFrame(rows)
        table.attrs.update(estimator=ranking.estimator, why=ranking.why, question=ranking.question)
        return table

    def ranking(
        self,
        k: int,
        *,
        opponents: bool = False,
        question: core.Question = "attribution",
        fdr: float | None = None,
        columns: list[int] | None = None,
    ) -> core.Ranking:
        """:func:`daunce_api.core.top` over all test examples, or some of them by index.

        Always computed over all of them: the estimator and its parameters must not depend on which are asked about.
        """
        ranking = core.top(
            self.train_loss_KN,
            self.test_loss_KM,
            k,
            self.estimator,
            opponents=opponents,
            inclusion_KN=self.inclusion_KN,
            noise=self.noise,
            rho=self.rho,
            question=question,
            fdr=fdr,
        )
        if columns is None:
            return ranking
        picked: dict[str, Any] = {
            name: None if (value := getattr(ranking, name)) is None else value[columns]
            for name in ("index_Mk", "score_Mk", "stderr_Mk", "z_Mk", "distinguishable_Mk")
        }
        return replace(ranking, **picked)

    def save(self, folder: str | Path) -> Path:
        """Write the attribution to a folder (``attribution.json``, ``losses.npz``), over what is there.

        Both files are written beside the old ones and then renamed, so that a crash leaves one whole version.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any]] = {
            "members_K": np.array(self.members, dtype=np.int64),
            "train_loss_KN": self.train_loss_KN,
            "test_loss_KM": self.test_loss_KM,
            "inclusion_KN": self.inclusion_KN,
        }
        for side, table in self.tokens.items():
            arrays[f"{side}_token_logprobs_KT"] = np.concatenate(table.logprobs, axis=1)
            arrays[f"{side}_token_counts"] = np.array([len(p) for p in table.pieces], dtype=np.int64)
        _replace(folder / "losses.npz", lambda path: _save_arrays(path, arrays))
        content = {
            "format": _FORMAT,
            "estimator": self.estimator,
            "noise": self.noise,
            "rho": self.rho,
            "loss": self.loss,
            "censored": self.censored,
            "facts": dict(self.facts),
            "train": _dataset_to_json(self.train),
            "test": _dataset_to_json(self.test),
            "tokens": {side: [list(p) for p in table.pieces] for side, table in self.tokens.items()},
        }
        text = json.dumps(content, ensure_ascii=True)
        _replace(folder / "attribution.json", lambda path: path.write_text(text, encoding="utf-8"))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """Read what :meth:`save` wrote.

        Raises ConfigurationError where nothing is there, StoreCorruptError where it is damaged. No pickle is read.
        """
        folder = Path(folder)
        if not (folder / "attribution.json").is_file():
            raise ConfigurationError(
                f"{folder} holds no saved attribution. `daunce run` writes one into its run folder."
            )
        try:
            content = json.loads((folder / "attribution.json").read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {_FORMAT}")
            with np.load(folder / "losses.npz", allow_pickle=False) as arrays:
                return cls._from_saved(content, dict(arrays))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreCorruptError(
                f"{folder} cannot be read as a saved attribution ({error}). Run `daunce run` again: it rewrites the "
                "folder from the run's store, without new fine-tunes."
            ) from error

    @classmethod
    def _from_saved(cls, content: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Attribution:
        tokens: dict[Side, TokenTable] = {}
        for side, pieces in content["tokens"].items():
            edges = np.cumsum(arrays[f"{side}_token_counts"])[:-1]
            logprobs = np.split(arrays[f"{side}_token_logprobs_KT"], edges, axis=1)
            tokens[side] = TokenTable(tuple(tuple(p) for p in pieces), tuple(logprobs))
        return cls(
            train=_dataset_from_json(content["train"]),
            test=_dataset_from_json(content["test"]),
            members=tuple(int(m) for m in arrays["members_K"]),
            train_loss_KN=arrays["train_loss_KN"],
            test_loss_KM=arrays["test_loss_KM"],
            inclusion_KN=arrays["inclusion_KN"],
            estimator=content["estimator"],
            noise=content["noise"],
            rho=content["rho"],
            loss=content["loss"],
            censored=content["censored"],
            tokens=tokens,
            facts=content["facts"],
        )


def ranking_row(ranking: core.Ranking, row: int, place: int) -> dict[str, Any]:
    """Score, standard error, 95 % interval, z and mark of one entry of a ranking, as plain numbers."""
    score = float(ranking.score_Mk[row, place])
    if ranking.stderr_Mk is None or ranking.z_Mk is None or ranking.distinguishable_Mk is None:
        return {"score": score}
    error = float(ranking.stderr_Mk[row, place])
    half = significance_threshold(ranking.members) * error
    return {
        "score": score,
        "stderr": error,
        "low": score - half,
        "high": score + half,
        "z": float(ranking.z_Mk[row, place]),
        "distinguishable": bool(ranking.distinguishable_Mk[row, place]),
    }


def _dataset_to_json(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "records": [e.to_record() for e in dataset]}


def _dataset_from_json(content: dict[str, Any]) -> Dataset:
    return Dataset.from_records(content["records"], name=content["name"])


def _save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _replace(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
