"""``daunce doctor``: one tiny example to the configured endpoint, and in plain words what came of it.

It deploys nothing, and trains nothing except, with ``--train-one``, one tiny job. A base model, or a fine-tune of the
run where the endpoint serves those alone, is asked for the log-probabilities of one short example, alone and beside
others, once and several times: whether it answers, whether the numbers are what they seem, how noisy and how fast they
are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._util.blocking import run_blocking
from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import (
    CapabilityError,
    DataError,
    DaunceError,
    ProviderError,
    RejectedError,
    StoreError,
)
from ..plan.prices import MILLION, prices_of
from ..providers.base import (
    Deferred,
    Listing,
    Scorer,
    ScorerCapabilities,
    TokenScores,
    Trainer,
    TrainerCapabilities,
    within_scope,
)
from ..providers.openai_wire.client import WireClient
from ..providers.openai_wire.echo import dialect_of_models
from ..providers.probe import probe_model
from ..providers.registry import Backend, capabilities_of, open_backend
from ..store import RunStore
from ..store.lock import RunLock
from ..store.run import LOCK_NAME
from .findings import Check, Findings
from .noise import BURST, REPEATS, RETRIES, burst, noise, patient
from .train_one import TinyJob, tiny_job, train_one

if TYPE_CHECKING:
    from ..run import Run

__all__ = ["Check", "Findings", "examine", "examine_backend", "fine_tunes_of", "tiny_job"]

PROBE_REQUESTS, PROBE_OUTPUT = 12, 128
"""Most requests of an endpoint's own test of two models, and tokens that they generate."""
SAME = 1e-3
"""Largest difference (nats) between an example alone and in a batch that counts as rounding."""


def examine(run: Run, *, tiny: TinyJob | None = None) -> Findings:
    """What the configured endpoints can do. Costs a few requests, and trains nothing but the ``tiny`` job, if any.

    Problems of the endpoint are findings; only an unusable config raises (ConfigurationError, MissingExtraError).
    """
    return run_blocking(_examine(run, tiny))


def price_of(run: Run) -> float | None:
    """Dollars that :func:`examine` costs at most: requests for the first example, one for all together, and the
    endpoint's own test. None where the price of tokens is not known."""
    _, scorer = capabilities_of(run.config)
    examples = [] if scorer.tried_on == "nothing" else _short_examples(run, Findings())
    if not examples:
        return 0.0
    repeats, (_, price) = RETRIES.attempts * REPEATS + min(BURST, scorer.max_concurrent_requests), prices_of(run.config)
    if price.input is None or price.output is None:
        return None
    sent = (repeats + PROBE_REQUESTS) * len(examples[0].ids) + sum(len(e.ids) for e in examples)
    answered = PROBE_OUTPUT + (repeats + len(examples) if scorer.scope != "any" else 0)
    # Single requests are sent at full price, whatever a run's batches cost.
    return (sent * price.input + answered * price.output) / MILLION


async def _examine(run: Run, tiny: TinyJob | None) -> Findings:
    findings = Findings()
    trainer, scorer = capabilities_of(run.config)
    jobs = trainer.workers or trainer.max_concurrent_jobs
    findings.add(
        "training",
        None,
        f"{trainer.provider}: {jobs} job{'s' * (jobs > 1)} at once, at least "
        f"{trainer.min_examples} example{'s' * (trainer.min_examples > 1)}, "
        f"{'takes a seed' if trainer.honours_seed else 'takes no seed'}",
    )
    _checkpoints(run.config.ensemble.checkpoints, trainer, findings)
    scopes = {"any": "any completion, exactly", "one_token": "completions of one token", "first_token": scorer.measured}
    findings.add("scoring", None, f"{scorer.provider} measures {scopes[scorer.scope]}")
    for note in dict.fromkeys((*trainer.notes, *scorer.notes)):
        findings.add("note", None, note)
    examples = _short_examples(run, findings)
    if not examples:
        return findings
    async with open_backend(run.config) as backend:
        known = fine_tunes_of(run.config)
        await examine_backend(backend, run.config.backend.model, examples, findings, fine_tunes=known)
        if tiny is not None and findings.ok:
            await train_one(run, backend, tiny, examples[0], findings)
    return findings


def fine_tunes_of(config: RunConfig) -> list[str]:
    """Fine-tunes that a run has by now: its own target model first, then those that it trained. While another process
    works on the run, those are left alone: a look takes the adapters that it loaded off the server again."""
    given = config.ensemble.target_model
    try:
        with RunStore.open(config.run_dir, read_only=True) as store:
            RunLock(config.run_dir / LOCK_NAME).release()
            trained = store.jobs.ready_models()
    except StoreError:
        trained = {}
    return [*([given] if given else []), *(trained[member] for member in sorted(trained))]


async def examine_backend(
    backend: Backend,
    model: str,
    examples: Sequence[EncodedExample],
    findings: Findings,
    *,
    fine_tunes: Sequence[str] = (),
) -> Findings:
    """Add to ``findings`` what a backend answers about a base model, or about one of ``fine_tunes`` where its scorer
    serves only such; the first example is the one that is repeated."""
    try:
        info = await patient(lambda: backend.trainer.model_info(model))
    except ProviderError as error:
        findings.add("base model", False, str(error))
    else:
        late = f"; it shuts down on {info.shutdown_date}" if info.shutdown_date else ""
        findings.add("base model", True, f"{info.id} is available{late}")
    await _jobs_route(backend.trainer, findings)
    scorer = backend.scorer
    if isinstance(scorer, Deferred):
        scorer = scorer.immediate
        findings.add("batches", None, "a run sends batches; what follows was asked by single requests at full price")
    await _dialect(scorer, findings)
    asked = _model_to_try(scorer.capabilities, model, fine_tunes, findings)
    if asked is None:
        return findings
    try:
        first = await noise(scorer, asked, examples[0], findings)
        await _together(scorer, asked, examples, first, findings)
        await _alignment(scorer, asked, examples[0], findings)
        if asked == model and fine_tunes:
            await _fine_tune(scorer, model, fine_tunes[0], examples[0], findings)
        await burst(scorer, asked, examples, first, findings)
    except DaunceError as error:
        findings.add("log-probabilities", False, str(error))
    return findings


async def _jobs_route(trainer: Trainer, findings: Findings) -> None:
    """Whether fine-tuning jobs can be listed: a gateway may pass on everything else."""
    if not isinstance(trainer, Listing):
        return
    try:
        await patient(lambda: trainer.jobs_of("doctor"))
    except ProviderError as error:
        findings.add("fine-tuning jobs", False, str(error))
        if error.status is not None:  # it was answered
            findings.advice.append(
                "the jobs route does not work here, so nothing can be trained. A gateway may need a license for it, or "
                "a pass-through address (LiteLLM: base_url .../openai)."
            )
    else:
        findings.add("fine-tuning jobs", True, "they can be listed")


def _model_to_try(scorer: ScorerCapabilities, base: str, fine_tunes: Sequence[str], findings: Findings) -> str | None:
    """The model that log-probabilities are asked of; None where that has to wait."""
    if scorer.tried_on == "base":
        return base
    if scorer.tried_on == "fine_tune" and fine_tunes:
        findings.add("log-probabilities of", None, f"{fine_tunes[0]}, since {scorer.provider} does not serve {base}")
        return fine_tunes[0]
    findings.tried = False
    why = (
        f"{scorer.provider} cannot be tried before a member is trained: only fine-tunes can be asked there"
        if scorer.tried_on == "fine_tune"
        else f"{scorer.provider} is not tried: a model would have to be deployed first, which is billed by the hour. "
        "The run deploys each member when it is scored, and checks every answer"
    )
    findings.add("log-probabilities", None, why)
    return None


def _checkpoints(asked: int, trainer: TrainerCapabilities, findings: Findings) -> None:
    """Whether the models of earlier epochs can be scored, and as many as the config asks for."""
    kept = trainer.checkpoints
    if asked == 1 and kept == 1:
        return
    models = "only the final model" if kept == 1 else f"the last {kept} models"
    asks = f"; ensemble.checkpoints asks for {asked}"
    findings.add("checkpoints", None if asked == 1 else asked <= kept, f"{models} of each job can be scored{asks}")
    if asked > kept:
        findings.advice.append(f"set ensemble.checkpoints to {kept}: {trainer.provider} offers no more.")


def _short_examples(run: Run, findings: Findings) -> list[EncodedExample]:
    """The shortest examples that the scorer can measure, at most four; what the plan refuses of any is a finding."""
    scorer = capabilities_of(run.config)[1]
    usable: dict[str, EncodedExample] = {}
    try:
        refused = [r for r in run.plan().refusals if isinstance(r, CapabilityError | DataError)]
        for example in (*run.encoded(run.train), *run.encoded(run.test)):
            with contextlib.suppress(CapabilityError):
                usable[example.key] = within_scope(example, scorer)
    except DataError as error:
        refused = [error]
    count = len(run.train) + len(run.test)
    findings.add("data", not refused, str(refused[0]) if refused else f"all {count:,} examples can be measured")
    return sorted(usable.values(), key=lambda e: len(e.ids))[:4]


async def _together(
    scorer: Scorer, model: str, examples: Sequence[EncodedExample], alone: TokenScores, findings: Findings
) -> None:
    """Whether an example gets the same values beside others in one request."""
    if scorer.capabilities.max_prompts_per_request == 1 or len(examples) == 1:
        return
    batch = list(examples[: scorer.capabilities.max_prompts_per_request])
    beside = (await patient(lambda: scorer.score(model, batch)))[0]
    difference = max(abs(a - b) for a, b in zip(alone.logprobs, beside.logprobs, strict=True))
    allowed = max(SAME, 5 * (findings.sigma_token or 0.0))
    findings.add(
        "batches",
        difference <= allowed,
        f"{len(batch)} examples in one request change a value by at most {difference:.2g} nats",
    )
    if difference > allowed:
        findings.advice.append(
            "values depend on what else is in the request: set backend.scorer.options.prompts_per_request: 1."
        )


async def _alignment(scorer: Scorer, model: str, example: EncodedExample, findings: Findings) -> None:
    report = await patient(lambda: probe_model(scorer, model, example, base=None))
    if report is not None:
        findings.add("alignment", True if report.checked else None, report.detail)


async def _fine_tune(scorer: Scorer, base: str, model: str, example: EncodedExample, findings: Findings) -> None:
    """Test a fine-tune of the run too: a server may be right for the base and wrong for adapters (vLLM issue 51594)."""
    name = "fine-tune's alignment"
    try:
        report = await patient(lambda: probe_model(scorer, model, example, base=base))
    except RejectedError as error:  # it may be gone by now, which says nothing of the endpoint
        findings.add(name, None, str(error))
    except ProviderError as error:
        findings.add(name, False, str(error))
    else:
        if report is not None:
            findings.add(name, True if report.checked else None, f"{report.detail} of {model}")


async def _dialect(scorer: Scorer, findings: Findings) -> None:
    """Whether the server says which kind it is, where the config does not."""
    inner = getattr(scorer, "inner", scorer)
    client, options = getattr(inner, "client", None), getattr(inner, "options", None)
    if not isinstance(client, WireClient) or getattr(options, "return_token_ids", True):
        return
    try:
        listed = (await client.get("models", doing="listing models")).get("data")
    except ProviderError:
        return
    dialect = dialect_of_models(listed)
    if dialect is None:
        findings.advice.append(
            "the token ids that the server read are not compared. If it can return them, set "
            "backend.scorer.options.return_token_ids: true."
        )
    else:
        findings.add("server", None, f"it is {dialect}")
        findings.advice.append(f"set backend.scorer.options.dialect: {dialect}, so that token ids are compared.")
