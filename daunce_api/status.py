"""How far a run is and what it used: from columns of its store, also while another process works on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ._util.text import dollars, duration
from .attribution import Attribution
from .attribution.from_store import Material, models_scored
from .config import RunConfig
from .core import SelfLDS
from .store import FINAL, TARGET, RunStore, name_of

_NAMED = 3
"""Failures that are named one by one."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    ``members_asked`` K; ``members_trained`` those with a model; ``members_scored`` those of which nothing is left to be
    scored; ``models_asked`` and ``models_scored`` count the models of all members, earlier checkpoints included
    (``ensemble.checkpoints``); ``members_running`` those with a job that is not final; ``members_failed`` those that
    are left out now. ``target``: state of the target model's job, None without one. ``questions``: answers that are
    explained; ``question_groups``: (questions, members) of each group that the same members have answered.
    ``trained_tokens`` as the provider counted them, the target model included; ``scored_tokens`` of prompts and
    completions, over all models and repeated measurements.
    ``cached_scores``: scores that an earlier run had paid
    for and that came from the cache. ``usd`` spent and reserved, None where a price of the run is not known;
    ``usd_by_purpose`` (train, score, probe, ask, retrain); ``max_usd``: the cap.
    ``started_at``, ``last_result_at`` ISO 8601, "" without any. ``busy_seconds``: a process worked on the run;
    ``seconds``: from the start to the last result, breaks included; ``job_seconds`` at the provider, queueing
    included, all jobs added up.
    ``models_until``: day (ISO 8601) on which the provider deletes the first of the models by itself, None where it
    does not (``ensemble.keep_days``). ``more``: what half as many members again are expected to add to ``self_lds``.
    ``measured``: what a loss is the loss of; ``censored``: share of the losses that are lower bounds.
    ``self_lds``, ``estimator`` and ``why`` are None below two members, and in a large run until they were computed.
    ``noise``: scoring noise of one loss in nats, None where nothing was scored twice. ``failures``: members that
    are left out, and why. ``stopped``: why the run ended before it was complete, "" where that no longer holds.
    ``recent``: the last changes.
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
    questions: int
    question_groups: tuple[tuple[int, int], ...]
    trained_tokens: int
    scored_tokens: int
    cached_scores: int
    usd: float | None
    usd_by_purpose: dict[str, float]
    max_usd: float | None
    started_at: str
    last_result_at: str
    busy_seconds: float
    seconds: float
    job_seconds: float
    self_lds: SelfLDS | None
    noise: float | None
    measured: str
    censored: float | None
    estimator: str | None
    why: str | None
    failures: tuple[str, ...]
    stopped: str
    recent: tuple[str, ...]
    models_until: str | None = None

    @property
    def title(self) -> str:
        """Its name; that of its folder where it has the default one."""
        return Path(self.run_dir).name if self.name == "run" else self.name

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
        answered = sum(questions for questions, _ in self.question_groups)
        if len(self.question_groups) > 1 or (self.question_groups and answered < self.questions):
            parts = [f"{questions} by {members} members" for questions, members in self.question_groups]
            open_ones = f", {self.questions - answered} not answered yet" if answered < self.questions else ""
            rows.append(("questions", f"{self.questions}: {', '.join(parts)}{open_ones}"))
        if self.failures:
            more = len(self.failures) - _NAMED
            rows.append(("given up", "; ".join(self.failures[:_NAMED]) + (f"; and {more} more" if more > 0 else "")))
        if self.stopped:
            rows.append(("stopped", self.stopped))
        if self.models_asked > self.members_asked:
            models = f"{self.models_scored} of {self.models_asked} scored, the checkpoints of earlier epochs among them"
            rows.append(("models", models))
        rows += [("spent", self._spent_text()), ("time", self._time_text())]
        if self.target is not None:
            rows.append(("target", self.target))
        if self.models_until is not None:
            rows.append(("kept", f"models until {self.models_until} at the earliest (ensemble.keep_days)"))
        if self.measured != "completion" or self.censored:
            bounds = f", {self.censored:.1%} of the losses are lower bounds" if self.censored else ""
            rows.append(("measured", f"{self.measured}{bounds}"))
        if self.noise is not None:
            rows.append(("noise", f"{self.noise:.2g} nats a loss (the same examples scored twice)"))
        if self.estimator is not None:
            rows += [("estimator", str(self.why)), ("quality", self.quality_text())]
        elif self.question_groups:
            rows.append(
                ("quality", "not computed for these members yet; `daunce report`, and the end of the run, do it")
            )
        if (to_come := self.more_text()) is not None:
            rows.append(("more", to_come))
        return rows

    def _spent_text(self) -> str:
        text = dollars(self.usd)
        parts = {purpose: usd for purpose, usd in self.usd_by_purpose.items() if usd}
        if self.usd and len(parts) > 1:
            text += f" ({', '.join(f'{purpose} {dollars(usd)}' for purpose, usd in parts.items())})"
        if self.max_usd is not None and self.usd is not None:
            text += f" of {dollars(self.max_usd)}"
        cached = f", {self.cached_scores:,} scores from the cache" if self.cached_scores else ""
        return f"{text}, {self.trained_tokens:,} tokens trained, {self.scored_tokens:,} tokens scored{cached}"

    def _time_text(self) -> str:
        return (
            f"{duration(self.busy_seconds)} busy, {duration(self.seconds)} elapsed from start to last result (breaks "
            f"included), {duration(self.job_seconds)} of fine-tuning jobs (queueing included, all jobs added up)"
        )

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
        if (more := self.more) is None:
            return None
        gain, low, high = (f"{round(more[name], 2) + 0.0:.2f}" for name in ("gain", "low", "high"))
        return f"{more['members']} more members would be expected to add {gain} [{low}, {high}]"

    @property
    def more(self) -> dict[str, float] | None:
        """What half as many members again (``members``) are expected to add to self_lds (``gain``), and the 95 %
        interval of what they will have added (``low``, ``high``); None where that cannot be foreseen."""
        quality = self.self_lds
        if quality is None or quality.curve is None:
            return None
        members = quality.members // 2
        gain, low, high = quality.gain(members)
        return {"members": members, "gain": gain, "low": low, "high": high}

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``daunce status --json`` prints it."""
        plain = asdict(self)
        if plain["self_lds"] is not None:
            del plain["self_lds"]["draws"]
        return {**plain, "more": self.more, "complete": self.complete}


def status_of(
    store: RunStore,
    material: Material,
    config: RunConfig,
    groups: Sequence[Attribution],
    scored: Sequence[int],
    elsewhere: Mapping[str, float],
) -> RunStatus:
    """Read the state of a run. ``groups``: the attribution of each group of questions, the largest first; none where
    there are too few members. ``scored``: members that lack nothing. ``elsewhere``: dollars by purpose of runs within
    this one (retraining)."""
    spent = Counter(store.ledger.spent_by_purpose())
    spent.update(elsewhere)
    attribution = groups[0] if groups else None
    judged = attribution if attribution is not None and attribution.judged else None
    last = {job.member: job for job in store.jobs.rows()}  # attempts are in order
    running = sum(job.status not in FINAL for member, job in last.items() if member != TARGET)
    left_out, stop = store.jobs.left_out(), store.history.stop()
    target = last.get(TARGET)
    return RunStatus(
        run_dir=str(config.run_dir),
        name=config.name,
        provider=config.backend.kind,
        model=config.backend.model,
        members_asked=material.ensemble.members,
        members_trained=len(store.jobs.ready_models().keys() - {TARGET}),
        members_scored=len(scored),
        models_asked=material.ensemble.members * material.models,
        models_scored=models_scored(store, material),
        members_running=running,
        members_failed=len(left_out.keys() - {TARGET}),
        target=None if target is None else target.status,
        questions=len(material.encoded_test),
        question_groups=tuple((len(group.test), len(group.members)) for group in groups),
        trained_tokens=sum(job.trained_tokens or 0 for job in store.jobs.rows()),
        scored_tokens=store.scores.tokens_scored(material.encoded_test, material.encoded_train),
        cached_scores=store.scores.cached(),
        usd=sum(spent.values()) if material.priced else None,
        usd_by_purpose=dict(sorted(spent.items())),
        max_usd=config.budget.max_usd,
        **asdict(store.history.times()),
        self_lds=None if judged is None else judged.self_lds,
        noise=None if attribution is None else attribution.noise,
        measured=material.measured,
        censored=None if attribution is None else attribution.censored,
        estimator=None if judged is None else judged.choice.estimator.name,
        why=None if judged is None else judged.choice.why,
        failures=tuple(f"{name_of(member)}: {reason}" for member, reason in left_out.items()),
        stopped="" if stop is None or len(scored) == material.ensemble.members else stop.reason,
        recent=tuple(
            f"{t.time} {t.subject}: {t.detail}"
            if t.after == "note"
            else f"{t.time} {t.subject}: {t.before or '-'} -> {t.after}{f' ({t.detail})' if t.detail else ''}"
            for t in [t for t in store.transitions() if not t.subject.startswith("spend ")][-5:]
        ),
        models_until=_models_until(store, config),
    )


def _models_until(store: RunStore, config: RunConfig) -> str | None:
    ready, days = set(store.jobs.ready_models().values()), config.ensemble.keep_days
    ends = [job.ended_at for job in store.jobs.rows() if job.model in ready and job.ended_at is not None]
    if days is None or not ends:
        return None
    return (datetime.fromisoformat(min(ends)) + timedelta(days=days)).date().isoformat()
