"""How often a job goes over its examples, where the config leaves that to the provider."""

from __future__ import annotations

from ..config import RunConfig
from ..providers.registry import capabilities_of
from .prices import provider_of

NAMES = ("n_epochs", "epochs")


def epochs_of(config: RunConfig, n_examples: int, *, target: bool) -> tuple[int, str | None]:
    """Epochs of a job on ``n_examples``, and what had to be assumed for it (None where nothing had to).

    OpenAI's ``auto`` follows its cookbook's estimate: 3 epochs, more for fewer than 34 examples (up to 25), fewer
    for more than 8,333.
    """
    training = config.training
    given = training.hyperparameters
    if target and training.target_hyperparameters is not None:
        given = training.target_hyperparameters
    for name in NAMES:
        value = given.get(name)
        if isinstance(value, int | float) and value >= 1:
            return int(value), None
    provider = provider_of(config.backend.kind, config.backend.base_url)
    if (own := capabilities_of(config)[0].epochs) is not None:
        return own, None
    epochs = 3
    if provider == "openai":
        if n_examples * 3 < 100:
            epochs = max(1, min(25, 100 // max(n_examples, 1)))
        elif n_examples * 3 > 25_000:
            epochs = max(1, 25_000 // n_examples)
    return epochs, (
        f"the number of epochs is left to the provider and taken to be {epochs}; set training.hyperparameters.n_epochs "
        "to be sure of the price"
    )
