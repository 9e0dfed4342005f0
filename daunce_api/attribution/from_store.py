"""From what the store holds to an ``Attribution``: the members whose every example is scored, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import RunConfig
from ..core import Checkpoints, resolve_censored
from ..data.dataset import Dataset
from ..data.questions import Questions
from ..data.subsets import Ensemble
from ..data.tokenizers import EncodedExample, Tokenizer
from ..errors import NotEnoughMembersError
from ..providers.learning_time import rho_of
from ..providers.objective import Objective
from ..store import Ids, RunStore
from . import Attribution, Side
from .derived import FOLDER
from .matrices import loss_matrix, measure_noise
from .token_table import stored_tokens


@dataclass(frozen=True)
class Material:
    """The examples of a run, read and encoded, and its ensemble."""

    train: Dataset
    test: Dataset
    measured: str
    """What a loss is the loss of; see ``ScorerCapabilities.measured``."""
    encoded_train: Sequence[EncodedExample]
    encoded_test: Sequence[EncodedExample]
    ensemble: Ensemble
    models: int = 1
    """Models of each job that are scored, the final one included (``ensemble.checkpoints``)."""
    priced: bool = True
    """Whether every price of the run is known; the ledger holds only what is."""

    @property
    def encoded(self) -> tuple[EncodedExample, ...]:
        """Everything that a member is asked about: test examples first, since they are few and shown first."""
        return (*self.encoded_test, *self.encoded_train)

    def ids(self, store: RunStore) -> Ids:
        """The store's ids of :attr:`encoded`; -1 for an example that nothing was ever measured of."""
        return np.concatenate([store.scores.find_ids(side) for side in (self.encoded_test, self.encoded_train)])

    def is_scored(self, store: RunStore, member: int, checkpoint: int = 0) -> bool:
        """Whether a model has been measured on everything that it is asked about."""
        return store.scores.has_all(self.ids(store), member, checkpoint=checkpoint)


def complete_members(store: RunStore, material: Material) -> list[int]:
    """Members of which every model that is wanted is scored on every example, ascending. A job that has fewer
    checkpoints than wanted, or of which some are gone, is complete without them."""
    scored = store.scores.complete(material.ids(store))
    members = []
    for k in range(material.ensemble.members):
        if (k, 0) in scored:
            wanted = store.jobs.earlier_models(k, material.models)
            if wanted is not None and all((k, n) in scored for n in wanted):
                members.append(k)
    return members


def question_groups(
    store: RunStore, material: Material, questions: Questions
) -> list[tuple[Material, tuple[int, ...]]]:
    """The material of each group of questions that the same members (at least two) have answered, and those members;
    the largest first.

    Each is one call of the core, with those members' training losses.
    """
    answered: dict[tuple[int, ...], list[int]] = {}
    for batch in questions:
        positions = [material.test.position(e.id) for e in batch.shown]
        if positions:
            members = tuple(complete_members(store, _only(material, positions)))
            answered.setdefault(members, []).extend(positions)
    groups = [(_only(material, sorted(places)), members) for members, places in answered.items() if len(members) > 1]
    return sorted(groups, key=lambda group: -len(group[0].encoded_test))


def _only(material: Material, positions: Sequence[int]) -> Material:
    """The material with some of its questions."""
    if len(positions) == len(material.test):
        return material
    test = Dataset([material.test[j] for j in positions], name=material.test.name)
    return replace(material, test=test, encoded_test=tuple(material.encoded_test[j] for j in positions))


def too_few_members(scored: int, material: Material) -> NotEnoughMembersError:
    """The error of an attribution that has fewer than two members."""
    return NotEnoughMembersError(
        f"{scored} of {material.ensemble.members} members are trained and scored; attribution needs at least 2. "
        "Everything so far is kept: run `daunce run` again to resume."
    )


def models_scored(store: RunStore, material: Material) -> int:
    """Models that are scored on every example, earlier checkpoints included."""
    scored = store.scores.complete(material.ids(store))
    return sum((k, n) in scored for k in range(material.ensemble.members) for n in range(material.models))


def assemble(
    store: RunStore,
    material: Material,
    config: RunConfig,
    tokenizer: Callable[[], Tokenizer] | None = None,
    *,
    members: Sequence[int] | None = None,
) -> Attribution:
    """The attribution of complete members, by default of all that are complete now.

    ``tokenizer`` opens what gives the token strings of token-level views; without it they are left out. Raises
    NotEnoughMembersError with fewer than two complete members.
    """
    members = complete_members(store, material) if members is None else list(members)
    if len(members) < 2:
        raise too_few_members(len(members), material)
    store.jobs.rows()  # Refused where one was edited by hand: its scores would be those of another model.
    reduction = config.attribution.loss
    models = [(k, 0) for k in members]
    find = store.scores.find_ids
    sides: dict[Side, Sequence[EncodedExample]] = {"test": material.encoded_test, "train": material.encoded_train}
    train_KN, train_censored_KN = loss_matrix(store, models, find(material.encoded_train), reduction)
    test_KM, test_censored_KM = loss_matrix(store, models, find(material.encoded_test), reduction)
    censored = (train_censored_KN.sum() + test_censored_KM.sum()) / (train_censored_KN.size + test_censored_KM.size)
    return Attribution(
        train=material.train,
        test=material.test,
        members=tuple(members),
        train_loss_KN=np.asarray(resolve_censored(train_KN, train_censored_KN), dtype=np.float64),
        test_loss_KM=np.asarray(resolve_censored(test_KM, test_censored_KM), dtype=np.float64),
        inclusion_KN=material.ensemble.inclusion_KN[members],
        weight_KN=_weights(config, material.ensemble, members),
        earlier=_earlier(store, material, members, config),
        estimator=config.attribution.estimator,
        noise=measure_noise(store, members, reduction),
        rho=rho_of(config, len(material.train)),
        loss=reduction,
        prior=config.attribution.prior,
        prior_model=config.attribution.prior_model,
        derived=store.run_dir / FOLDER,
        measured=material.measured,
        censored=float(censored),
        tokens={
            side: stored_tokens(store.run_dir, members, examples, find(examples), tokenizer)
            for side, examples in sides.items()
            if tokenizer is not None
        },
        facts=_facts(store, config, material),
    )


def _weights(config: RunConfig, ensemble: Ensemble, members: Sequence[int]) -> NDArray[np.float64] | None:
    """What moved members that the local backend perturbed by more than their subsets."""
    if config.backend.kind != "local":
        return None
    objective = Objective.of_options(config.backend.options)
    return objective.weights_KN(ensemble.inclusion_KN[members], ensemble.seeds_K[members])


def _earlier(store: RunStore, material: Material, members: Sequence[int], config: RunConfig) -> Checkpoints | None:
    """Losses of the members' earlier checkpoints, ascending by epoch; NaN where a member has fewer than others."""
    if material.models == 1:
        return None
    scored = store.scores.complete(material.ids(store))
    stages: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for number in range(material.models - 1, 0, -1):
        rows = [row for row, k in enumerate(members) if (k, number) in scored]
        if not rows:
            continue
        models = [(members[row], number) for row in rows]
        sides = []
        for examples in (material.encoded_train, material.encoded_test):
            found, censored = loss_matrix(store, models, store.scores.find_ids(examples), config.attribution.loss)
            loss = np.full((len(members), len(examples)), np.nan)
            # Bounds stay whatever their share: one example less would cost the whole stage.
            loss[rows] = resolve_censored(found, censored, max_share=1.0)
            sides.append(loss)
        stages.append((sides[0], sides[1]))
    if not stages:
        return None
    return Checkpoints(np.stack([train for train, _ in stages]), np.stack([test for _, test in stages]))


def _facts(store: RunStore, config: RunConfig, material: Material) -> dict[str, Any]:
    return {
        "run": config.name,
        "provider": config.backend.kind,
        "model": config.backend.model,
        "start_from": config.ensemble.start_from,
        "subset_ratio": config.ensemble.subset_ratio,
        "usd": store.ledger.spent() if material.priced else None,
    }
