"""How many tokens are trained on and how often, and how many are sent and answered to measure one model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import RunConfig
from ..data.dataset import Dataset, Example
from ..data.tokenizers import Encode, EncodedExample, TiktokenTokenizer, tiktoken_encoding_name
from ..errors import CapabilityError, DataError, DaunceError
from ..providers.base import ScorerCapabilities, TrainerCapabilities, within_scope
from ..providers.probe import tokens_of_test
from ..providers.registry import capabilities_of
from .examples import bytes_refusals, context_of, left_out_notes, listed, measured_refusals
from .prices import provider_of

EPOCHS = ("n_epochs", "epochs")
"""Names of the hyperparameter, by provider."""


@dataclass(frozen=True, slots=True)
class Counts:
    """``training_N``: tokens that one epoch on each training example bills. ``input``, ``output``: tokens of all
    prompts for one model, and of the answers to them; ``again``: those of the prompts that each member gets twice, to
    measure noise; ``test``: tokens of the endpoint's test of one model. ``refusals``: what cannot be measured,
    ``about_jobs``: what cannot be trained on."""

    training_N: tuple[int, ...]
    input: int
    output: int
    exact: bool
    refusals: tuple[DaunceError, ...]
    about_jobs: tuple[DaunceError, ...] = ()
    notes: tuple[str, ...] = ()
    again: tuple[int, int] = (0, 0)
    test: int = 0


def count(
    config: RunConfig,
    train: Dataset,
    test: Dataset,
    encode: Encode,
    trainer: TrainerCapabilities,
    scorer: ScorerCapabilities,
    *,
    questions_only: bool = False,
) -> Counts:
    """Count a run's tokens. ``encode`` is only called where token ids are available. ``questions_only``: models are not
    scored on the training examples.

    OpenAI's chat template is not public: there, training and prompts are counted by its published rule (contents,
    three tokens a message, three for the reply) with tiktoken, or estimated where tiktoken's rank file is out of
    reach. Everything else is counted from the token ids that are trained on and sent.

    Raises DataError that names every example that cannot be encoded.
    """
    published = _published_rule(config)
    if published is not None and not published.exact:
        examples = [*test] if questions_only else [*test, *train]
        again = [] if questions_only else train[: config.scoring.noise_probe]
        training = tuple(published.count(e) for e in train)
        return Counts(
            training,
            sum(_prompt(e, published) for e in examples),
            len(examples),
            False,
            tuple(_without_ids(config, train, test, scorer, questions_only)),
            tuple(_too_long(trainer.provider, context_of(config, trainer), (train, training), slack=1.3)),
            again=(sum(_prompt(e, published) for e in again), len(again)),
        )
    encoded_train, encoded_test = tuple(encode(train)), tuple(encode(test))
    ids_N, ids_M = ([len(e.ids) for e in encoded] for encoded in (encoded_train, encoded_test))
    widest, limit = scorer.max_context_tokens, trainer.max_context_tokens
    refusals = list(_too_long(scorer.provider, widest, (train, ids_N), (test, ids_M)))
    if limit is not None and widest is not None and widest <= limit:
        limit = None  # what exceeds the scorer's is named once
    about_jobs = list(_too_long(trainer.provider, limit, (train, ids_N)))
    scoped_train, unmeasured = scoped(train, encoded_train, scorer)
    scoped_test, unmeasured_test = scoped(test, encoded_test, scorer)
    if questions_only:
        scoped_train, unmeasured = [], []
    if refused := [*unmeasured_test, *unmeasured]:
        concerned = listed([place for place, _ in refused])
        refusals.append(CapabilityError(f"{refused[0][1]} This concerns {concerned}."))
    if not refusals:
        sides = [(test, scoped_test), *([] if questions_only else [(train, scoped_train)])]
        refusals += measured_refusals(scorer, sides, exact=True)
    unique = {e.key: e for e in (*scoped_test, *scoped_train)}
    probed = {e.key: e for e in scoped_train[: config.scoring.noise_probe]}
    one_token = scorer.scope != "any"
    training = tuple(ids_N if published is None else map(published.count, train))

    def sent(examples: Iterable[EncodedExample]) -> tuple[int, int]:
        """Tokens of prompts, and of answers."""
        asked = [*examples]
        if published is not None:
            prompts = sum(_prompt(e.example, published) for e in asked)
        else:
            prompts = sum(e.targets[0] if one_token else len(e.ids) for e in asked)
        return prompts, len(asked) if one_token else 0

    if published is not None and trainer.max_context_tokens is None:
        about_jobs += _too_long(trainer.provider, context_of(config, trainer), (train, training))
    notes = left_out_notes([(train, encoded_train), (test, encoded_test)])
    return Counts(
        training,
        *sent(unique.values()),
        True,
        tuple(refusals),
        tuple(about_jobs),
        tuple(notes),
        sent(probed.values()),
        0 if one_token else tokens_of_test(min(len(e.ids) for e in unique.values())),
    )


def _without_ids(
    config: RunConfig, train: Dataset, test: Dataset, scorer: ScorerCapabilities, questions_only: bool
) -> Iterable[DaunceError]:
    """What can be refused of the examples where no token ids are available."""
    data = config.data
    asked = [(test, data.asked), *([] if questions_only else [(train, data.measured(one_turn=scorer.one_turn))])]
    turns = [(dataset, [e.trained_turns(which) for e in dataset]) for dataset, which in asked]
    stand_ins = [
        (dataset, [EncodedExample(e, (0, 0), (1,), turns=t) for e, t in zip(dataset, chosen, strict=True)])
        for dataset, chosen in turns
    ]
    refused = measured_refusals(scorer, stand_ins, exact=False)
    if refused:
        return refused
    return bytes_refusals(scorer, [(dataset, [t[-1] if t else 0 for t in chosen]) for dataset, chosen in turns])


def _published_rule(config: RunConfig) -> TiktokenTokenizer | None:
    name = config.backend.tokenizer or config.backend.model
    if provider_of(config.backend.kind, config.backend.base_url) not in ("azure", "openai"):
        return None
    return TiktokenTokenizer(name) if tiktoken_encoding_name(name) is not None else None


def _prompt(example: Example, tokenizer: TiktokenTokenizer) -> int:
    """Tokens of the request that asks for an example's (last) answer."""
    if not example.is_chat:
        return tokenizer.count(replace(example, completion=""))
    return tokenizer.count(replace(example, messages=example.messages[:-1]))


def _too_long(
    provider: str, limit: int | None, *sides: tuple[Dataset, Iterable[int]], slack: float = 1.0
) -> Iterable[DaunceError]:
    """The examples that are longer, by their tokens, than what a trainer or a scorer takes, where that is known;
    ``slack`` where tokens are estimates."""
    if limit is None:
        return
    problems = [
        f"{dataset.where(position)}: {tokens:,} tokens"
        for dataset, lengths in sides
        for position, tokens in enumerate(lengths)
        if tokens > slack * limit
    ]
    if problems:
        yield DataError(
            f"{provider} takes {limit:,} tokens at most, and {len(problems):,} of the examples "
            f"{'is' if len(problems) == 1 else 'are'} longer: their ends, the answers, would be cut off, and trained "
            "or measured wrongly. Nothing was sent. Shorten or drop these:",
            problems,
        )


def scoped(
    dataset: Dataset, encoded: Sequence[EncodedExample], scorer: ScorerCapabilities
) -> tuple[list[EncodedExample], list[tuple[str, CapabilityError]]]:
    """What is measured of each example, and the examples of which nothing can be, with their places."""
    measured, refused = [], []
    for position, example in enumerate(encoded):
        try:
            measured.append(within_scope(example, scorer))
        except CapabilityError as error:
            measured.append(example)
            refused.append((dataset.where(position), error))
    return measured, refused


def epochs_of(config: RunConfig, n_examples: int, *, target: bool) -> tuple[int, str | None]:
    """Epochs of a job on ``n_examples``, and what had to be assumed for it (None where nothing had to).

    OpenAI's ``auto`` follows its cookbook's estimate: 3 epochs, more for fewer than 34 examples (up to 25), fewer
    for more than 8,333.
    """
    given = config.training.of_target if target else config.training.hyperparameters
    for name in EPOCHS:
        value = given.get(name)
        if isinstance(value, int | float) and value >= 1:
            return int(value), None
    if (own := capabilities_of(config)[0].epochs) is not None:
        return own, None
    epochs = 3
    if provider_of(config.backend.kind, config.backend.base_url) == "openai":
        if n_examples * 3 < 100:
            epochs = max(1, min(25, 100 // max(n_examples, 1)))
        elif n_examples * 3 > 25_000:
            epochs = max(1, 25_000 // n_examples)
    return epochs, (
        f"the number of epochs is left to the provider and taken to be {epochs}; set training.hyperparameters.n_epochs "
        "to be sure of the price"
    )
