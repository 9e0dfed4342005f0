"""How far a run is: from its store alone, also while another process works on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from ._util.text import dollars, duration
from .attribution.from_store import Material, assemble, complete_members, models_scored
from .config import RunConfig
from .core import SelfLDS
from .errors import NotEnoughMembersError
from .providers.base import JobStatus
from .store import FINAL, TARGET, RunStore
from .usage import usage_of

_TOLD = 3
"""Failures that are told one by one."""


@dataclass(frozen=True)
class More:
    """What ``members`` more members are expected to add to self_lds, and the 95 % interval of what they will have
    added."""

    members: int
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    ``members_asked`` K; ``members_trained`` those with a model; ``members_scored`` those whose every example is
    scored; ``models_asked`` and ``models_scored`` count the models of all members, earlier checkpoints included
    (``ensemble.checkpoints``); ``members_running`` those with a job that is not final; ``members_failed`` those whose
    last attempt failed. ``target``: state of the target model's job, None without one. ``usd``, ``trained_tokens``,
    ``scored_tokens``, ``seconds``, ``job_seconds``: see :class:`~daunce_api.usage.Usage`. ``cached_scores``: scores
    that an earlier run had paid for and that came from the cache.
    ``more``: what half as many members again are expected to add to ``self_lds``.
    ``measured``: what a loss is the loss of; ``censored``: share of the losses that are lower bounds.
    ``noise``: scoring noise of one loss in nats, None where nothing was scored twice. ``failures``: members that
    were given up, and why. ``recent``: the last changes.
    """

    run_dir: str
    name: str
    provider: str
    model: str
    members_asked: int
    members_trained: int
    members_scored: int
    models_asked: int
    models_scored: int
    members_running: int
    members_failed: int
    target: str | None
    trained_tokens: int
    scored_tokens: int
    cached_scores: int
    usd: float | None
    seconds: float
    job_seconds: float
    self_lds: SelfLDS | None
    noise: float | None
    measured: str
    censored: float | None
    estimator: str | None
    why: str | None
    failures: tuple[str, ...]
    recent: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Every member is scored."""
        return self.members_scored == self.members_asked

    def rows(self) -> list[tuple[str, str]]:
        """The state in words, each with its name."""
        rows = [
            ("run", f"{self.name} in {self.run_dir}"),
            ("model", f"{self.model} at {self.provider}"),
            (
                "members",
                f"{self.members_scored} of {self.members_asked} scored, {self.members_trained} trained, "
                f"{self.members_running} running, {self.members_failed} failed",
            ),
        ]
        if self.failures:
            more = len(self.failures) - _TOLD
            rows.append(("given up", "; ".join(self.failures[:_TOLD]) + (f"; and {more} more" if more > 0 else "")))
        if self.models_asked > self.members_asked:
            models = f"{self.models_scored} of {self.models_asked} scored, the checkpoints of earlier epochs among them"
            rows.append(("models", models))
        cached = f", {self.cached_scores:,} scores from the cache" if self.cached_scores else ""
        tokens = f"{self.trained_tokens:,} tokens trained, {self.scored_tokens:,} tokens scored{cached}"
        jobs = f"{duration(self.job_seconds)} of fine-tuning jobs"
        rows += [
            ("spent", f"{dollars(self.usd)}, {tokens}"),
            ("time", f"{duration(self.seconds)} from start to last result, {jobs}"),
        ]
        if self.target is not None:
            rows.append(("target", self.target))
        if self.measured != "completion" or self.censored:
            bounds = f", {self.censored:.1%} of the losses are lower bounds" if self.censored else ""
            rows.append(("measured", f"{self.measured}{bounds}"))
        if self.noise is not None:
            rows.append(("noise", f"{self.noise:.2g} nats a loss (the same examples scored twice)"))
        if self.estimator is not None:
            rows += [("estimator", str(self.why)), ("quality", self.quality_text())]
        if (to_come := self.more_text()) is not None:
            rows.append(("more", to_come))
        return rows

    def quality_text(self) -> str:
        """self_lds in words."""
        q = self.self_lds
        if q is None:
            return "self_lds is not known below 8 members"
        rough = "; a rough guess below 20 members" if q.rough else ""
        return (
            f"self_lds {q.value:.2f} (95 % interval {q.low:.2f} to {q.high:.2f}{rough}): how well the scores predict "
            "members they have not seen; 1 is perfect, 0 is chance"
        )

    def more_text(self) -> str | None:
        """What half as many members again would add, in words; None where that cannot be foreseen."""
        more = self.more
        if more is None:
            return None
        gain, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in (more.gain, more.low, more.high))
        return f"{more.members} more members would be expected to add {gain} [{low}, {high}]"

    @property
    def more(self) -> More | None:
        """What half as many members again would bring; None where that cannot be foreseen."""
        quality = self.self_lds
        if quality is None or quality.curve is None:
            return None
        members = quality.members // 2
        return More(members, *quality.gain(members))

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``daunce status --json`` prints it."""
        quality, more = self.self_lds, self.more
        if quality is not None:
            quality = replace(quality, draws=None)
        plain = asdict(replace(self, self_lds=quality))
        if quality is not None:
            del plain["self_lds"]["draws"]
        return {**plain, "more": None if more is None else asdict(more), "complete": self.complete}


def status_of(store: RunStore, material: Material, config: RunConfig) -> RunStatus:
    """Read the state of a run."""
    last = {job.member: job for job in store.jobs.rows()}  # attempts are in order
    states = Counter(_state(job.status) for member, job in last.items() if member != TARGET)
    ready = store.jobs.ready_models()
    quality = noise = censored = estimator = why = None
    try:
        attribution = assemble(store, material, config)
    except NotEnoughMembersError:
        pass
    else:
        quality, noise, censored = attribution.self_lds, attribution.noise, attribution.censored
        estimator, why = attribution.choice.estimator.name, attribution.choice.why
    target = last.get(TARGET)
    used = usage_of(store, material.encoded, priced=material.priced)
    return RunStatus(
        run_dir=str(config.run_dir),
        name=config.name,
        provider=config.backend.kind,
        model=config.backend.model,
        members_asked=material.ensemble.members,
        members_trained=len(ready.keys() - {TARGET}),
        members_scored=len(complete_members(store, material)),
        models_asked=material.ensemble.members * material.models,
        models_scored=models_scored(store, material),
        members_running=states["running"],
        members_failed=states["failed"],
        target=None if target is None else target.status,
        trained_tokens=used.trained_tokens,
        scored_tokens=used.scored_tokens,
        cached_scores=store.scores.cached(),
        usd=used.usd,
        seconds=used.seconds,
        job_seconds=used.job_seconds,
        self_lds=quality,
        noise=noise,
        measured=material.measured,
        censored=censored,
        estimator=estimator,
        why=why,
        failures=failures_of(store),
        recent=tuple(
            f"{t.time} {t.subject}: {t.before or '-'} -> {t.after}{f' ({t.detail})' if t.detail else ''}"
            for t in [t for t in store.transitions() if not t.subject.startswith("spend ")][-5:]
        ),
    )


def failures_of(store: RunStore) -> tuple[str, ...]:
    """Members that were given up, one sentence each."""
    names = {member: "the target model" if member == TARGET else f"member {member}" for member in store.jobs.left_out()}
    return tuple(f"{names[member]}: {left.reason}" for member, left in store.jobs.left_out().items())


def _state(status: str) -> str:
    if status not in FINAL:
        return "running"
    return "trained" if status == JobStatus.SUCCEEDED else "failed"
