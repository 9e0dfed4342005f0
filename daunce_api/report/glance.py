"""The strip above the answers: a few numbers with the words that make them readable, and what to be warned of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._util.text import dollars, duration, summarized
from ..attribution import Attribution
from ..attribution.notebook import checkpoints
from ..status import RunStatus
from .ranked import OVERLAP

_FAILURES = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """One number: what it is, its value, and one line on how to read it."""

    label: str
    value: str
    detail: str


def glance(attribution: Attribution, run: RunStatus | None, significant: float, overlap: float) -> list[Tile]:
    """The tiles of a report; what is not known without the run has none."""
    choice, quality, scored = attribution.choice, attribution.self_lds, len(attribution.members)
    tiles = [
        Tile(
            "Members",
            str(scored) if run is None or run.members_asked == scored else f"{scored} of {run.members_asked}",
            f"each trained on {_percent(attribution.inclusion_KN.mean())} of the training examples"
            + (f"; {run.members_failed} failed" if run is not None and run.members_failed else "")
            + (f"; {earlier}" if (earlier := checkpoints(attribution)) else ""),
        ),
        Tile(
            "Quality (self-LDS)",
            "unknown" if quality is None else f"{quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]",
            "needs at least 8 members"
            if quality is None
            else "with its 95 % interval; 1 = held-out members are predicted perfectly"
            + ("; a rough guess below 20 members" if quality.rough else ""),
        ),
        Tile(
            "Estimator",
            choice.estimator.name.replace("_", "-"),
            f"{choice.why}. Scores of other members or another estimator are on another scale: do not compare them.",
        ),
        Tile(
            "Significant",
            _percent(significant),
            "of all pairs (5 %, per pair): about 5 % would be by chance alone",
        ),
        Tile(
            "Shared with BM25",
            _percent(overlap),
            f"of the first {min(OVERLAP, len(attribution.train))} proponents are also in a text search's first "
            f"{min(OVERLAP, len(attribution.train))}",
        ),
    ]
    if run is not None:
        tokens = f"{run.trained_tokens:,} tokens trained, {run.scored_tokens:,} tokens scored"
        jobs = f"the jobs took {duration(run.job_seconds)} in all"
        tiles += [Tile("Cost", dollars(run.usd), tokens), Tile("Time", duration(run.seconds), f"{_when(run)}; {jobs}")]
    tiles.append(
        Tile(
            "Scoring noise",
            "not measured" if attribution.noise is None else f"{attribution.noise:.2g} nats",
            "set scoring.noise_probe to measure it"
            if attribution.noise is None
            else "standard deviation of one loss that is scored twice",
        )
    )
    if attribution.censored:
        detail = "of losses are known only as lower bounds: the token was not listed"
        tiles.append(Tile("Censored", _percent(attribution.censored, 1), detail))
    return tiles


def first_notes(attribution: Attribution, run: RunStatus | None, previous: str) -> list[str]:
    """What has to be known before the answers are read. ``previous``: how the scores of the page before were made."""
    first, failures = [run.stopped] if run is not None and run.stopped else [], run.failures if run is not None else ()
    first += failures[:_FAILURES]
    if len(failures) > _FAILURES:
        first.append(f"{len(failures) - _FAILURES} more members failed.")
    if attribution.measured != "completion":
        first.append(f"Measured: {attribution.measured}. Scores are about that, not about whole answers.")
    if previous and previous != state_of(attribution):
        first.append(
            f"The report before this one was of {previous}, this one is of {state_of(attribution)}. Compare ranks "
            "between the two, not scores."
        )
    return first


def more_notes(
    attribution: Attribution, warnings: Sequence[str], *, shown_tests: int, cut: int | None, shown_train: int
) -> list[str]:
    """Warnings of the data, and what this page leaves out."""
    more = summarized(warnings)
    if shown_tests < len(attribution.test):
        more.append(
            f"The page shows the first {shown_tests:,} of {len(attribution.test):,} answers; the run holds the scores "
            "of all."
        )
    if shown_train < len(attribution.train):
        more.append(
            f"The page holds {shown_train:,} of {len(attribution.train):,} training examples: all that are listed, and "
            "those with the highest self-influence."
        )
    if cut is not None:
        more.append(f"Texts longer than {cut:,} characters are cut to keep the page small.")
    return more


def state_of(attribution: Attribution) -> str:
    """What has to be the same for two scores to be comparable, in words: members, estimator and its parameters."""
    setting = attribution.choice.setting
    ridge = "" if setting.ridge is None else f" (lambda {setting.ridge:.2g})"
    estimator = attribution.choice.estimator.name.replace("_", "-") + ridge
    return f"{len(attribution.members)} members, {estimator}{' with a prior' if setting.prior else ''}"


def unit(attribution: Attribution) -> str:
    """What scores are measured in, one sentence."""
    name = attribution.choice.estimator.name
    if name == "covariance":
        return "A score is in nats²: loss of the training example times loss of the answer."
    if name == "correlation":
        return "A score is a correlation, between −1 and 1."
    if name == "whitened":
        return "A score has no unit: compare scores within one answer."
    return "A score is in nats, up to a factor that all pairs share: compare scores within one answer."


def _percent(share: float, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f} %"


def _when(run: RunStatus) -> str:
    """Dates come as ISO text; the minute is precise enough to read."""
    times = [t[:16].replace("T", " ") for t in (run.started_at, run.last_result_at) if t]
    if len(times) == 2 and times[0][:10] == times[1][:10]:
        times[1] = times[1][11:]
    return " to ".join(times) + (" UTC" if times else "")
