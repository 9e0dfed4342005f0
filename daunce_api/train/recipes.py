"""What each member's job is submitted with."""

from __future__ import annotations

from functools import cached_property

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.subsets import Ensemble
from ..providers.base import JobRequest
from ..store import TARGET

SUFFIX_CHARACTERS = 43
"""What a suffix of 64 characters leaves beside a mark of the key; the run key must not be cut off."""


class Recipes:
    """Training files and requests of a run's members and its target model (-1).

    ``protocol``: older recordings hold suffixes that were not shortened.
    """

    def __init__(self, ensemble: Ensemble, dataset: Dataset, config: RunConfig, run_key: str, *, protocol: int) -> None:
        self._ensemble = ensemble
        self._dataset = dataset
        self._config = config
        self._run_key = run_key
        self._protocol = protocol

    def content(self, member: int) -> bytes:
        """The training file of a member: its subset; of the target: everything."""
        positions = range(len(self._dataset)) if member == TARGET else self._ensemble.subset(member).tolist()
        return self._dataset.training_file(positions, self._config.data.loss_on)

    @cached_property
    def validation(self) -> bytes | None:
        """The validation file as the provider gets it; no member is trained on it, and it is never attributed."""
        data = self._config.data
        if data.validation is None:
            return None
        examples = Dataset.from_file(data.validation, data.columns)
        return examples.training_file(range(len(examples)), data.loss_on)

    def request(
        self, member: int, base: str, key: str, file_id: str, validation_file_id: str | None = None
    ) -> JobRequest:
        """The request for a member's job."""
        training = self._config.training
        hyperparameters = training.of_target if member == TARGET else training.hyperparameters
        named = f"{self._run_key}-{'target' if member == TARGET else f'm{member}'}"
        room = SUFFIX_CHARACTERS - len(named) - 1 if self._protocol >= 2 else None
        return JobRequest(
            key=key,
            model=base,
            file_id=file_id,
            seed=self._ensemble.target_seed if member == TARGET else int(self._ensemble.seeds_K[member]),
            hyperparameters=dict(hyperparameters),
            suffix=f"{self._config.name[:room]}-{named}",
            validation_file_id=validation_file_id,
        )
