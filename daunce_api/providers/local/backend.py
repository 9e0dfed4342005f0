"""``kind: local``: what the registry asks a kind of backend for."""

from __future__ import annotations

from ...config import RunConfig
from ...data.tokenizers import Tokenizer
from ..registry import Context
from .kits import kit_of
from .scorer import LocalScorer, scorer_capabilities
from .trainer import LocalTrainer, trainer_capabilities
from .workshop import Workshop

__all__ = [
    "LocalScorer",
    "LocalTrainer",
    "open_scorer",
    "open_tokenizer",
    "open_trainer",
    "scorer_capabilities",
    "trainer_capabilities",
]


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the model."""
    return kit_of(config).tokenizer()


def open_trainer(context: Context) -> LocalTrainer:
    """The trainer of a run; its files, jobs and adapters are kept in ``RUN/local``."""
    return LocalTrainer(_workshop(context))


def open_scorer(context: Context) -> LocalScorer:
    """The scorer of a run; it shares workers and adapters with the run's trainer."""
    return LocalScorer(_workshop(context))


def _workshop(context: Context) -> Workshop:
    workshop = context.shared.get("local")
    if not isinstance(workshop, Workshop):
        workshop = context.shared["local"] = Workshop(context.config)
    return workshop
