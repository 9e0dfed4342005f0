"""``Attribution``: the losses of an ensemble and everything that can be asked of them.

It holds two loss matrices and the examples, not the N x M scores: those are computed where they are needed. It can be
saved, loaded and looked at without the run, the provider or a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import core, saved
from .core.losses import Reduction
from .core.uncertainty import significance_threshold
from .dataset import Dataset
from .errors import ConfigurationError, NotEnoughMembersError

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Side = Literal["train", "test"]


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
        measured: what a loss is the loss of: "completion", or "first completion token only".
        censored: share of scored losses that are lower bounds.
        tokens: token tables by side ("train", "test"), where they were kept.
        facts: provider, model and other plain facts of the run, for display.
        earlier: losses of the same members at earlier checkpoints of their training, in nats, or None.
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
    measured: str = "completion"
    censored: float = 0.0
    tokens: Mapping[Side, TokenTable] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    earlier: core.Checkpoints | None = None

    def with_estimator(self, estimator: str) -> Attribution:
        """The same losses under another estimator."""
        return replace(self, estimator=estimator)

    def first(self, members: int) -> Attribution:
        """The attribution of the first so many members alone."""
        keep = slice(members)
        tokens = {s: TokenTable(t.pieces, tuple(x[keep] for x in t.logprobs)) for s, t in self.tokens.items()}
        return replace(
            self,
            members=self.members[keep],
            train_loss_KN=self.train_loss_KN[keep],
            test_loss_KM=self.test_loss_KM[keep],
            inclusion_KN=self.inclusion_KN[keep],
            tokens=tokens,
            earlier=None if self.earlier is None else self.earlier.members(keep),
        )

    @cached_property
    def _losses(self) -> core.MemberLosses:
        return core.member_losses(self.train_loss_KN, self.test_loss_KM, self.inclusion_KN, self.earlier)

    @cached_property
    def choice(self) -> core.Choice:
        """The estimator in use and why it was chosen."""
        return core.choose(self._losses, self.estimator, core.Setting(self.noise, self.rho))

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
                earlier=self.earlier,
            )
        except NotEnoughMembersError:
            return None

    def scores_NM(self) -> NDArray[Any]:
        """(N, M) scores; positive = helpful."""
        return core.scores(
            self.train_loss_KN,
            self.test_loss_KM,
            self.inclusion_KN,
            self.estimator,
            noise=self.noise,
            rho=self.rho,
            earlier=self.earlier,
        )

    def scores(self, by: Literal["source"] | None = None) -> pd.DataFrame:
        """Scores as a table: rows are training ids (or sources, whose score is the sum over their examples), columns
        test ids; positive = helpful."""
        import pandas as pd

        table = pd.DataFrame(self.scores_NM(), index=pd.Index(self.train.ids, name="train"), columns=self.test.ids)
        if by is None:
            return table
        # As an array: pandas takes a list for names of columns where every source is also the id of a test example.
        return table.groupby(np.array(self.labels("train"))).sum().rename_axis("source")

    def __repr__(self) -> str:
        checkpoints = "" if self.earlier is None else f" with {len(self.earlier)} earlier checkpoints"
        return (
            f"Attribution({len(self.members)} members{checkpoints}, "
            f"{len(self.train)} training x {len(self.test)} test examples, estimator={self.estimator!r})"
        )

    def _repr_html_(self) -> str:
        from .report import notebook_html

        return notebook_html(self)

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
        pairs), ``prompt``, ``completion``. ``DataFrame.attrs`` holds ``estimator``, ``why``, ``question``
        and ``measured``.

        Raises DataError for an unknown test id, and what :func:`daunce_api.core.top` raises.
        """
        import pandas as pd

        j = self.test.position(test)
        ranking = self.ranking(k, opponents=opponents, question=question, fdr=fdr, columns=[j])
        score, z = ranking.score_Mk[0], _known(ranking.z_Mk)[0]
        correlation = ranking.estimator == "correlation"
        error, marks = _known(ranking.stderr_Mk)[0], _known(ranking.distinguishable_Mk)[0]
        members = np.full(score.shape, ranking.members) if ranking.common_Mk is None else ranking.common_Mk[0]
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
                    **_interval(
                        score[rank], error[rank], z[rank], bool(marks[rank]), members[rank], correlation=correlation
                    ),
                    "prompt": example.prompt_text(),
                    "completion": example.completion_text(),
                }
            )
        table = pd.DataFrame(rows)
        table.attrs.update(
            estimator=ranking.estimator, why=ranking.why, question=ranking.question, measured=self.measured
        )
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

        The estimator and its parameters are always chosen over all of them, and a false-discovery rate is over all
        pairs: neither may depend on which are asked about.
        """
        choice = self.choice
        if question != "attribution":
            choice = core.choose(self._losses, self.estimator, core.Setting(self.noise, self.rho), question)
        if columns is None or fdr is None:
            losses = self._losses if columns is None else self._losses.columns(test=columns)
            return core.ranked(losses, choice, k, opponents=opponents, fdr=fdr)
        ranking = core.ranked(self._losses, choice, k, opponents=opponents, fdr=fdr)
        picked: dict[str, Any] = {
            name: None if (value := getattr(ranking, name)) is None else value[columns]
            for name in ("index_Mk", "score_Mk", "stderr_Mk", "z_Mk", "distinguishable_Mk", "common_Mk")
        }
        return replace(ranking, **picked)

    def groups(self, *, train: bool = True, test: bool = False) -> core.GroupScores:
        """Scores summed over sources, on the training side, the test side or both, with their own standard errors."""
        return core.group_scores(
            self.train_loss_KN,
            self.test_loss_KM,
            self.labels("train") if train else None,
            self.labels("test") if test else None,
            self.estimator,
            inclusion_KN=self.inclusion_KN,
            noise=self.noise,
            rho=self.rho,
            earlier=self.earlier,
        )

    def top_groups(self, test: str, k: int = 10, *, opponents: bool = False) -> pd.DataFrame:
        """The sources whose examples, summed, helped a test example most (or hurt it most).

        Columns: ``rank``, ``source``, ``examples`` (how many it has), ``score``, ``stderr``, ``low``, ``high``, ``z``,
        ``distinguishable``, as in :meth:`top`.
        """
        import pandas as pd

        j = self.test.position(test)
        groups = self.groups()
        sizes = Counter(self.labels("train"))
        threshold = significance_threshold(len(self.members))
        score, error = groups.score_GH[:, j], groups.stderr_GH[:, j]
        z = np.divide(score, error, out=np.full(score.shape, np.nan), where=error > 0)
        rows = [
            {
                "source": label,
                "examples": sizes[str(label)],
                **_interval(score[g], error[g], z[g], bool(abs(z[g]) >= threshold), len(self.members)),
            }
            for g, label in enumerate(groups.train_groups)
        ]
        table = pd.DataFrame(rows).sort_values("score", ascending=opponents, kind="stable").head(k)
        table.insert(0, "rank", range(1, len(table) + 1))
        table.attrs.update(
            estimator=groups.estimator,
            why=groups.why,
            question="how much each source moves the answer's loss",
            measured=self.measured,
        )
        return table.reset_index(drop=True)

    def self_influence(self) -> core.SelfInfluence:
        """What members say about each training example by itself: mislabelled ones stand out."""
        return core.self_influence(self.train_loss_KN, self.inclusion_KN, self.noise or 0.0)

    def save(self, folder: str | Path) -> Path:
        """Write the attribution to a folder (``attribution.json``, ``losses.npz``), over what is there.

        Both files are written beside the old ones and then renamed, so that a crash leaves whole files. Raises
        StoreError where the folder cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {
            "members_K": np.array(self.members, dtype=np.int64),
            "train_loss_KN": self.train_loss_KN,
            "test_loss_KM": self.test_loss_KM,
            "inclusion_KN": self.inclusion_KN,
        }
        if self.earlier is not None:
            arrays["earlier_train_loss_SKN"] = self.earlier.train_loss_SKN
            arrays["earlier_test_loss_SKM"] = self.earlier.test_loss_SKM
        for side, table in self.tokens.items():
            arrays[f"{side}_token_logprobs_KT"] = np.concatenate(table.logprobs, axis=1)
            arrays[f"{side}_token_counts"] = np.array([len(p) for p in table.pieces], dtype=np.int64)
        content = {
            "estimator": self.estimator,
            "noise": self.noise,
            "rho": self.rho,
            "loss": self.loss,
            "measured": self.measured,
            "censored": self.censored,
            "facts": dict(self.facts),
            "train": _dataset_to_json(self.train),
            "test": _dataset_to_json(self.test),
            "tokens": {side: [list(p) for p in table.pieces] for side, table in self.tokens.items()},
        }
        return saved.write(Path(folder), content, arrays)

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """Read what :meth:`save` wrote.

        Raises ConfigurationError where nothing is there, StoreCorruptError where it is damaged. No pickle is read.
        """
        return saved.read(Path(folder), cls._from_saved)

    @classmethod
    def _from_saved(cls, content: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Attribution:
        tokens: dict[Side, TokenTable] = {}
        for side, pieces in content["tokens"].items():
            edges = np.cumsum(arrays[f"{side}_token_counts"])[:-1]
            logprobs = np.split(arrays[f"{side}_token_logprobs_KT"], edges, axis=1)
            tokens[side] = TokenTable(tuple(tuple(p) for p in pieces), tuple(logprobs))
        earlier = None
        if "earlier_train_loss_SKN" in arrays:
            earlier = core.Checkpoints(arrays["earlier_train_loss_SKN"], arrays["earlier_test_loss_SKM"])
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
            measured=content["measured"],
            censored=content["censored"],
            tokens=tokens,
            facts=content["facts"],
            earlier=earlier,
        )


def _interval(
    score: float, stderr: float, z: float, marked: bool, members: int, *, correlation: bool = False
) -> dict[str, Any]:
    """A score with its standard error, 95 % interval, z and mark, as plain numbers."""
    low, high = core.confidence_interval(np.asarray(score), np.asarray(stderr), members, correlation=correlation)
    return {
        "score": float(score),
        "stderr": float(stderr),
        "low": float(low),
        "high": float(high),
        "z": float(z),
        "distinguishable": marked,
    }


def _known(values: NDArray[Any] | None) -> NDArray[Any]:
    if values is None:
        raise ConfigurationError("this ranking was made without standard errors.")
    return values


def _dataset_to_json(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "records": [e.to_record() for e in dataset]}


def _dataset_from_json(content: dict[str, Any]) -> Dataset:
    return Dataset.from_records(content["records"], name=content["name"])
