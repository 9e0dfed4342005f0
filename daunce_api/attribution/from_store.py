"""From what the store holds to an ``Attribution``: the members whose every example is scored, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import RunConfig
from ..core import Checkpoints, per_example_losses, resolve_censored
from ..data.dataset import Dataset
from ..data.subsets import Ensemble
from ..data.tokenizers import EncodedExample, Tokenizer
from ..errors import NotEnoughMembersError
from ..providers.base import TokenScores
from ..providers.objective import Objective
from ..score.health import measure_noise
from ..store import RunStore
from . import Attribution, Side, TokenTable

_MEAN_RATE = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}
"""Mean learning rate over a schedule, as a share of its peak."""
MAX_TOKEN_ENTRIES = 20_000_000
"""Token log-probabilities that an attribution carries at most of a side (160 MB); above it, that side is left out."""


@dataclass(frozen=True)
class Material:
    """The examples of a run, read and encoded, and its ensemble."""

    train: Dataset
    test: Dataset
    measured: str
    """What a loss is the loss of; see ``ScorerCapabilities.measured``."""
    encoded_train: tuple[EncodedExample, ...]
    encoded_test: tuple[EncodedExample, ...]
    ensemble: Ensemble
    models: int = 1
    """Models of each job that are scored, the final one included (``ensemble.checkpoints``)."""
    priced: bool = True
    """Whether every price of the run is known; the ledger holds only what is."""

    @property
    def encoded(self) -> tuple[EncodedExample, ...]:
        """Everything that a member is asked about: test examples first, since they are few and shown first."""
        return self.encoded_test + self.encoded_train

    def is_scored(self, store: RunStore, member: int, checkpoint: int = 0) -> bool:
        """Whether a model has been measured on everything that it is asked about."""
        return store.scores.has_all(store.scores.find_ids(self.encoded), member, checkpoint=checkpoint)


def complete_members(store: RunStore, material: Material) -> list[int]:
    """Members of which every model that is asked for is scored on every example, ascending."""
    return [k for k in range(material.ensemble.members) if is_complete(store, material, k)]


def is_complete(store: RunStore, material: Material, member: int) -> bool:
    """Whether nothing is left to be scored of a member. A job that has fewer checkpoints than asked for, or of which
    some are gone, is complete without them."""
    if not material.is_scored(store, member):
        return False
    wanted = store.jobs.wanted_checkpoints(member, material.models)
    return wanted is not None and all(material.is_scored(store, member, n) for n in wanted)


def models_scored(store: RunStore, material: Material) -> int:
    """Models that are scored on every example, earlier checkpoints included."""
    places = [(k, n) for k in range(material.ensemble.members) for n in range(material.models)]
    return sum(material.is_scored(store, k, n) for k, n in places)


def assemble(store: RunStore, material: Material, config: RunConfig, tokenizer: Tokenizer | None = None) -> Attribution:
    """The attribution of the members that are complete now.

    ``tokenizer`` gives the token strings of token-level views; without it they are left out. Raises
    NotEnoughMembersError with fewer than two complete members.
    """
    members = complete_members(store, material)
    if len(members) < 2:
        raise NotEnoughMembersError(
            f"{len(members)} of {material.ensemble.members} members are trained and scored; attribution needs at "
            "least 2. What is there is kept: run `daunce run` again to go on."
        )
    scored = [_by_key(store, material, k) for k in members]
    noise = measure_noise(store, members, config.attribution.loss)
    train_KN, train_censored_KN = _losses(scored, material.encoded_train, config)
    test_KM, test_censored_KM = _losses(scored, material.encoded_test, config)
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
        noise=noise.sigma_example if noise.pairs else None,
        rho=learning_time_ratio(config, len(material.train)),
        loss=config.attribution.loss,
        measured=material.measured,
        censored=float(censored),
        tokens={} if tokenizer is None else _tokens(scored, material, tokenizer),
        facts=_facts(store, config, material, len(members)),
    )


def _weights(config: RunConfig, ensemble: Ensemble, members: Sequence[int]) -> NDArray[np.float64] | None:
    """What moved members that the local backend perturbed by more than their subsets."""
    if config.backend.kind != "local":
        return None
    objective = Objective.of_options(config.backend.options)
    return objective.weights_KN(ensemble.inclusion_KN[members], ensemble.seeds_K[members])


def _earlier(store: RunStore, material: Material, members: Sequence[int], config: RunConfig) -> Checkpoints | None:
    """Losses of the members' earlier checkpoints, ascending by epoch; NaN where a member has fewer than others."""
    stages: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for number in range(material.models - 1, 0, -1):
        complete = {row: k for row, k in enumerate(members) if material.is_scored(store, k, number)}
        scored = {row: _by_key(store, material, k, number) for row, k in complete.items()}
        if not scored:
            continue
        sides = []
        for examples in (material.encoded_train, material.encoded_test):
            found, censored = _losses(list(scored.values()), examples, config)
            loss = np.full((len(members), len(examples)), np.nan)
            # Bounds stay whatever their share: one example less would cost the whole stage.
            loss[list(scored)] = resolve_censored(found, censored, max_share=1.0)
            sides.append(loss)
        stages.append((sides[0], sides[1]))
    if not stages:
        return None
    return Checkpoints(np.stack([train for train, _ in stages]), np.stack([test for _, test in stages]))


def _by_key(store: RunStore, material: Material, member: int, checkpoint: int = 0) -> dict[str, TokenScores]:
    answers = store.scores.load(member, checkpoint=checkpoint).scores()
    ids = store.scores.find_ids(material.encoded).tolist()
    return {e.key: answers[i] for i, e in zip(ids, material.encoded, strict=True)}


def _losses(
    scored: Sequence[Mapping[str, TokenScores]], examples: Sequence[EncodedExample], config: RunConfig
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    loss = np.empty((len(scored), len(examples)))
    censored = np.zeros(loss.shape, dtype=np.bool_)
    keys = [e.key for e in examples]
    for k, answers in enumerate(scored):
        loss[k] = per_example_losses([answers[key].logprobs for key in keys], config.attribution.loss)
        censored[k] = [answers[key].any_censored for key in keys]
    return loss, censored


def learning_time_ratio(config: RunConfig, n_train: int) -> float | None:
    """rho of METHOD item 6: (member's steps x learning rate) / (target's steps x learning rate).

    None for members that start from the base, and where the recipes do not say (provider defaults, a target that was
    trained elsewhere). None for the objective ``fisher``, too: its curvature is that of squared margins, which no
    p (1 - p) damps, so that its members are not short where the target's would be (with rho, LDS was .05 lower on
    digits and the same on Fashion-MNIST).
    """
    if config.ensemble.start_from != "target" or config.ensemble.target_model is not None:
        return None
    if Objective.of_options(config.backend.options).kind == "fisher":
        return None
    member = config.training.hyperparameters
    target = config.training.target_hyperparameters or member
    epochs = _ratio(member, target, "n_epochs", needed=True)
    batch = _ratio(member, target, "batch_size", needed=False)
    rate = _ratio(member, target, "learning_rate_multiplier", needed=False)
    if rate is not None:
        plain = _ratio(member, target, "learning_rate", needed=False)
        rate = None if plain is None else rate * plain
    here, there = _reach(member), _reach(target)
    if epochs is None or batch is None or rate is None or here is None or there is None:
        return None
    if member.get("optimizer") != target.get("optimizer"):
        return None
    rate *= here / there
    subset = round(config.ensemble.subset_ratio * n_train) / n_train
    return float(epochs * subset / batch * rate)


def _reach(recipe: Mapping[str, Any]) -> float | None:
    """How far a step at peak rate 1 goes on average, by what a classifier's recipe may say: the schedule, and momentum,
    which repeats each step 1 / (1 - momentum) times. None where it says something else."""
    rate, momentum = _MEAN_RATE.get(recipe.get("schedule", "constant")), recipe.get("momentum", 0.0)
    if rate is None or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        return None
    return rate / (1 - momentum)


def _ratio(member: Mapping[str, Any], target: Mapping[str, Any], name: str, *, needed: bool) -> float | None:
    a, b = member.get(name), target.get(name)
    if a == b and (a is not None or not needed) and a != "auto":
        return 1.0
    if isinstance(a, int | float) and isinstance(b, int | float) and b:
        return a / b
    return None


def _tokens(
    scored: Sequence[Mapping[str, TokenScores]], material: Material, tokenizer: Tokenizer
) -> dict[Side, TokenTable]:
    sides: dict[Side, tuple[EncodedExample, ...]] = {"test": material.encoded_test, "train": material.encoded_train}
    tables: dict[Side, TokenTable] = {}
    for side, examples in sides.items():
        if len(scored) * sum(len(e.targets) for e in examples) <= MAX_TOKEN_ENTRIES:
            tables[side] = TokenTable(
                tuple(tuple(tokenizer.pieces([e.ids[t] for t in e.targets])) for e in examples),
                tuple(np.array([answers[e.key].logprobs for answers in scored]) for e in examples),
            )
    return tables


def _facts(store: RunStore, config: RunConfig, material: Material, complete: int) -> dict[str, Any]:
    jobs = [j for j in store.jobs.rows() if j.member >= 0]
    return {
        "run": config.name,
        "provider": config.backend.kind,
        "model": config.backend.model,
        "start_from": config.ensemble.start_from,
        "subset_ratio": config.ensemble.subset_ratio,
        "members_asked": material.ensemble.members,
        "members_complete": complete,
        "failed_attempts": sum(j.status in ("failed", "cancelled") for j in jobs),
        "trained_tokens": sum(j.trained_tokens or 0 for j in store.jobs.rows()),
        "usd": store.ledger.spent() if material.priced else None,
    }
