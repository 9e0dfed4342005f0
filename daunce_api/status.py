"""How far a run is: from its store alone, also while another process works on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .assembly import Material, assemble, complete_members, models_scored
from .backends.base import JobStatus
from .config import RunConfig
from .core import SelfLDS
from .errors import NotEnoughMembersError
from .store import FINAL, TARGET, RunStore
from .usage import usage_of


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    ``members_asked`` K; ``members_trained`` those with a model; ``members_scored`` those whose every example is
    scored; ``models_asked`` and ``models_scored`` count the models of all members, earlier checkpoints included
    (``ensemble.checkpoints``); ``members_running`` those with a job that is not final; ``members_failed`` those whose
    last attempt failed. ``target``: state of the target model's job, None without one. ``usd``: reserved and settled.
    ``trained_tokens``, ``scored_tokens``, ``seconds``, ``job_seconds``: see :class:`~daunce_api.usage.Usage`.
    ``cached_scores``: scores that an earlier run had paid for and that came from the cache.
    ``measured``: what a loss is the loss of; ``censored``: share of the losses that are lower bounds.
    ``noise``: scoring noise of one loss in nats, None where nothing was scored twice. ``recent``: the last changes.
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
    usd: float
    seconds: float
    job_seconds: float
    self_lds: SelfLDS | None
    noise: float | None
    measured: str
    censored: float | None
    estimator: str | None
    why: str | None
    recent: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Every member is scored."""
        return self.members_scored == self.members_asked

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``daunce status --json`` prints it."""
        return {**asdict(self), "complete": self.complete}


def status_of(store: RunStore, material: Material, config: RunConfig) -> RunStatus:
    """Read the state of a run."""
    last = {job.member: job for job in store.jobs()}  # attempts are in order
    states = Counter(_state(job.status) for member, job in last.items() if member != TARGET)
    ready = store.ready_models()
    quality = noise = censored = estimator = why = None
    try:
        attribution = assemble(store, material, config)
    except NotEnoughMembersError:
        pass
    else:
        quality, noise, censored = attribution.self_lds, attribution.noise, attribution.censored
        estimator, why = attribution.choice.estimator.name, attribution.choice.why
    target = last.get(TARGET)
    used = usage_of(store, material.encoded)
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
        cached_scores=store.cached_scores(),
        usd=used.usd,
        seconds=used.seconds,
        job_seconds=used.job_seconds,
        self_lds=quality,
        noise=noise,
        measured=material.measured,
        censored=censored,
        estimator=estimator,
        why=why,
        recent=tuple(
            f"{t.time} {t.subject}: {t.before or '-'} -> {t.after}{f' ({t.detail})' if t.detail else ''}"
            for t in [t for t in store.transitions() if not t.subject.startswith("spend ")][-5:]
        ),
    )


def _state(status: str) -> str:
    if status not in FINAL:
        return "running"
    return "trained" if status == JobStatus.SUCCEEDED else "failed"
