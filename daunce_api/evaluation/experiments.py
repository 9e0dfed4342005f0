"""How good a run's attribution is, by experiment: LDS, retrieval and removal, each beside text-only baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from .._util.text import command_line
from ..attribution import Attribution
from ..data.subsets import Ensemble, plan_ensemble
from ..errors import ConfigurationError, DataError
from ..run import Run
from ..score.work import Options
from . import lds, load_truth, save_truth
from .methods import method_scores
from .removal import removal_rise
from .retraining import EVALUATION_FOLDER, kept_shape, question_losses, retraining
from .retrieval import retrieval
from .table import Row, Table

# -- retrieval: from the scores that exist ---------------------------------------------------------------------------


def read_labels(path: str | Path, attribution: Attribution) -> NDArray[np.bool_]:
    """(N, M) which training examples are known to be behind which test example.

    The file is JSON: a list of training ids (for all test examples), or an object from test ids to such lists (test
    examples that are not in it do not count). Raises DataError for an unknown id or another shape.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error
    train, test = attribution.train, attribution.test
    everywhere = content if isinstance(content, list) else None
    by_test = dict.fromkeys(test.ids, everywhere) if everywhere is not None else content
    if not isinstance(by_test, dict) or not all(isinstance(ids, list) for ids in by_test.values()):
        raise DataError(f"{path} must hold a list of training ids, or an object from test ids to such lists.")
    known = np.zeros((len(train), len(test)), dtype=np.bool_)
    for test_id, ids in by_test.items():
        known[[train.position(str(i)) for i in ids], test.position(str(test_id))] = True
    return known


def retrieval_table(attribution: Attribution, known_NM: NDArray[np.bool_]) -> Table:
    """How well each method ranks the known training examples first: average precision, precision at their number, mean
    reciprocal rank. Nothing is trained. Raises DataError where nothing is known."""
    rows = []
    for method, score_NM in method_scores(attribution).items():
        found = retrieval(score_NM, known_NM)
        rows.append(
            Row(method, {"AP": found.average_precision, "P@planted": found.precision, "MRR": found.mrr}),
        )
        tests = found.tests
    share = float(known_NM[:, known_NM.any(axis=0)].mean())
    notes = f"{tests} test example{'s' * (tests != 1)}; {share:.1%} of the training examples are known ones."
    return Table("retrieval", tuple(rows), (notes, *_measured(attribution.measured)))


# -- LDS: retrain on random subsets -------------------------------------------------------------------------------


def lds_truth(run: Run, *, subsets: int = 100, ratio: float = 0.5, seeds: int = 1) -> Run:
    """The run that LDS needs: ``seeds`` fine-tunes on each of ``subsets`` random subsets, none of them a member's.

    More subsets later keep the earlier ones; fewer take the first of those that exist.
    Raises ConfigurationError for fewer than 3 subsets, or where a subset is also a member's (a training set of a few
    examples).
    """
    if subsets < 3 or seeds < 1:
        raise ConfigurationError(f"LDS needs at least 3 subsets and 1 seed; got {subsets} and {seeds}.")
    name = f"lds-r{ratio:g}-s{seeds}"
    models = max(subsets * seeds, kept_shape(run, name)[0])
    design = _lds_design(run, -(-models // seeds), ratio, seeds)
    if _shares_a_subset(run, design.inclusion_KN):
        raise ConfigurationError("A subset of the truth is also a member's: the training set is too small for LDS.")
    return retraining(run, name, design, wanted=subsets * seeds)


def kept_lds_truth(run: Run, seeds: int | None = None) -> Run:
    """The retraining of an earlier LDS of this run; ``seeds`` says which, where there are several.

    Raises ConfigurationError where there is none, or more than one.
    """
    folders = sorted(f for f in (run.run_dir / EVALUATION_FOLDER).glob("lds-r*-s*") if f.is_dir())
    found = [(f, int(f.name.rpartition("-s")[2])) for f in folders]
    fitting = [(folder, count) for folder, count in found if seeds in (None, count)]
    if not fitting:
        evaluate = command_line("evaluate", str(run.run_dir), "--lds")
        there = f" with {seeds} seeds" if seeds is not None and found else ""
        raise ConfigurationError(
            f"{run.run_dir} holds no retrained models for LDS{there}. `{evaluate}` trains them; "
            "its plan and price come first. Scores alone can be exported as npy, parquet or bergson."
        )
    if len(fitting) > 1:
        names = ", ".join(folder.name for folder, _ in fitting)
        raise ConfigurationError(f"{run.run_dir} holds more than one truth of LDS ({names}): say which with seeds.")
    folder, count = fitting[0]
    models, ratio = kept_shape(run, folder.name)
    return retraining(run, folder.name, _lds_design(run, models // count, ratio, count))


def _lds_design(run: Run, subsets: int, ratio: float, seeds: int) -> Ensemble:
    drawn = plan_ensemble(len(run.train), subsets, ratio, _seed(run, "subsets"))
    trained = plan_ensemble(len(run.train), subsets * seeds, ratio, _seed(run, "training"))
    return Ensemble(drawn.inclusion_KN.repeat(seeds, axis=0), trained.seeds_K, trained.target_seed)


def _shares_a_subset(run: Run, inclusion_SN: NDArray[np.bool_]) -> bool:
    member = {row.tobytes() for row in run.material.ensemble.inclusion_KN}
    return any(row.tobytes() in member for row in inclusion_SN)


def lds_table(run: Run, truth: Run, **options: Unpack[Options]) -> Table:
    """Train what is missing, then compare each method's predictions with the retrained models' losses.

    ``options``: of :meth:`daunce_api.Run.execute`. Raises any DaunceError; the same call again resumes.
    """
    truth.measure(**options)
    measured = question_losses(truth)
    attribution = run.attribution()
    subset, loss = _of(attribution, run, measured.by_subset())
    table = _lds_table(attribution, subset, loss, f"{len(subset)} subsets, {len(measured.models)} models")
    return replace(table, notes=(*table.notes, _kept(truth)))


def lds_table_of_file(run: Run, path: str | Path) -> Table:
    """Compare each method's predictions with a truth from elsewhere (`daunce_api.evaluation.load_truth`); nothing is
    trained.

    Raises DataError where the file is not a truth for this run, or one of its subsets is also a member's.
    """
    subset, loss = load_truth(path, run.train.ids, run.test.ids)
    if _shares_a_subset(run, subset):
        raise DataError(f"A subset in {path} is also a member's; a truth must not have been trained on by members.")
    attribution = run.attribution()
    return _lds_table(attribution, *_of(attribution, run, (subset, loss)), f"{len(subset)} subsets of {path}")


def export_truth(run: Run, path: str | Path, attribution: Attribution, *, seeds: int | None = None) -> Path:
    """Write what an earlier LDS of this run has measured, with the scores, for dattri (see `save_truth`).

    Raises ConfigurationError where nothing is measured yet; see also `kept_lds_truth`.
    """
    measured = question_losses(kept_lds_truth(run, seeds))
    if not measured.models:
        evaluate = command_line("evaluate", str(run.run_dir), "--lds")
        raise ConfigurationError(f"No model of the truth is scored yet. `{evaluate}` resumes.")
    truth = _of(attribution, run, measured.by_subset())
    return save_truth(path, *truth, run.train.ids, attribution.test.ids, attribution.scores_NM())


def _of(
    attribution: Attribution, run: Run, truth: tuple[NDArray[np.bool_], NDArray[np.float64]]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The truth about the questions of an attribution: one group of those of the run."""
    subset, loss = truth
    return subset, loss[:, [run.test.position(question) for question in attribution.test.ids]]


def _lds_table(
    attribution: Attribution, inclusion_SN: NDArray[np.bool_], loss_SM: NDArray[np.float64], basis: str
) -> Table:
    scores = method_scores(attribution)
    # An example that too few members have scored has no score to judge; no method is asked about it.
    known_NM = np.asarray(np.isfinite(np.stack(list(scores.values()))).all(axis=0))
    tests = known_NM.any(axis=0) & np.isfinite(loss_SM).all(axis=0)
    if not tests.any():
        raise DataError("No test example has scores and retrained losses to compare. All models are kept; score more.")
    train = known_NM[:, tests].all(axis=1)
    rows, notes = [], [f"{basis}; 95 % intervals over subsets."]
    for method, score_NM in scores.items():
        found = lds(score_NM[np.ix_(train, tests)], inclusion_SN[:, train], loss_SM[:, tests])
        rows.append(Row(method, {"LDS": found.value, "low": found.low, "high": found.high}))
        undefined = int(np.isnan(found.per_test_M).sum())
        if undefined:
            notes.append(
                f"{method}: {undefined} of {found.per_test_M.size} answers have no correlation and do not count, since "
                "predictions or losses do not vary over subsets."
            )
    if not (train.all() and tests.all()):
        notes.append(
            f"{(~train).sum()} of {train.size} training and {(~tests).sum()} of {tests.size} test examples are left "
            "out for all methods: their losses are missing, or mere lower bounds in most models."
        )
    quality = attribution.self_lds
    if quality is not None:
        notes.append(
            f"The run's own estimate is {quality.raw:.3f} against single fine-tunes, {quality.value:.3f} (self_lds) "
            "against fine-tunes averaged over many seeds."
        )
    return Table("lds", tuple(rows), (*notes, *_measured(attribution.measured)))


# -- removal: retrain without the top examples ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Removal:
    """A removal experiment: its models, and which of them lacks what.

    Attributes:
        truth: the run of the models: for each method and test example one without that method's top k, then some
            without k random ones.
        methods, columns: of the first models, method by method; positions of the test examples.
        measured: what a loss is the loss of.
    """

    truth: Run
    methods: tuple[str, ...]
    columns: tuple[int, ...]
    measured: str = "completion"


def removal_truth(run: Run, *, k: int = 10, tests: Sequence[str] = (), randoms: int = 5) -> Removal:
    """The models that a removal experiment needs.

    Args:
        run: a run whose members are scored.
        k: how many training examples are left out.
        tests: ids of test examples; default: the first five.
        randoms: models without k random examples.

    Raises:
        ConfigurationError: k or ``randoms`` out of range. DataError: an unknown id.
    """
    attribution = run.attribution()
    count = len(run.train)
    if not 1 <= k < count or randoms < 2:
        raise ConfigurationError(f"Removal needs k between 1 and {count - 1} and at least 2 random removals.")
    questions = list(tests) or attribution.test.ids[:5]
    ranked = [attribution.test.position(t) for t in questions]
    columns = [run.test.position(t) for t in questions]
    compared = method_scores(attribution)
    masks = [_without(np.argsort(-s[:, j], kind="stable")[:k], count) for s in compared.values() for j in ranked]
    rng = np.random.default_rng(_seed(run, "removal"))
    masks += [_without(rng.permutation(count)[:k], count) for _ in range(randoms)]
    seeds = plan_ensemble(count, len(masks), 0.5, _seed(run, "training"))
    design = Ensemble(np.stack(masks), seeds.seeds_K, seeds.target_seed)
    # What is removed depends on the members scored so far: another ranking is another experiment.
    return Removal(
        retraining(run, f"removal-{design.digest[:8]}", design), tuple(compared), tuple(columns), attribution.measured
    )


def removal_table(experiment: Removal, **options: Unpack[Options]) -> Table:
    """Train what is missing, then compare losses without a method's top k with losses without k random examples.

    ``rise``: mean over test examples, nats; higher = the removed ones mattered more. Its interval is that of
    :func:`~daunce_api.evaluation.removal.removal_rise`. ``options`` as in :func:`lds_table`. Raises any DaunceError.
    """
    experiment.truth.measure(**options)
    measured = question_losses(experiment.truth)
    loss_of = dict(zip(measured.models, measured.loss_SM, strict=True))
    columns = list(experiment.columns)
    chosen = len(experiment.methods) * len(columns)
    random = [loss_of[m][columns] for m in range(chosen, experiment.truth.material.ensemble.members) if m in loss_of]
    if not random:
        raise DataError(
            "No model without random examples is scored, so there is nothing to compare with. Run the command again."
        )
    random_RT = np.stack(random)
    known_T = np.isfinite(random_RT).all(axis=0)  # of the others a model gave only a lower bound
    known_T &= np.isfinite([loss_of.get(p, measured.loss_SM[0])[columns[p]] for p in range(len(columns))])
    rows = []
    for number, method in enumerate(experiment.methods):
        first = number * len(columns)
        there = [p for p in range(len(columns)) if first + p in loss_of and known_T[p]]
        figures = dict.fromkeys(("rise", "low", "high"))
        if there:
            found = removal_rise([loss_of[first + p][columns[p]] for p in there], random_RT[:, there])
            figures = {"rise": found.value, "low": found.low, "high": found.high}
        rows.append(Row(method, figures))
    notes = [
        f"{len(columns)} test example{'s' * (len(columns) != 1)}; rise of the loss in nats over the mean of "
        f"{len(random)} random removals, with 95 % intervals for the choice of answers, one fine-tune each, and the "
        "random removals that they share."
    ]
    if len(random) > 1:
        spread = float(np.std(random_RT[:, known_T], axis=0, ddof=1).mean())
        notes.append(f"One random removal differs from another by {spread:.3g} nats (standard deviation).")
    return Table("removal", tuple(rows), (*notes, *_measured(experiment.measured), _kept(experiment.truth)))


def _kept(truth: Run) -> str:
    clean = command_line("clean", str(truth.run_dir))
    return f"The models belong to {truth.run_dir}, a run folder of its own: `{clean}` deletes them."


def _measured(measured: str) -> tuple[str, ...]:
    """What the losses are of, where that is not the whole completion."""
    return () if measured == "completion" else (f"Measured: {measured}.",)


def _without(removed: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    kept = np.ones(count, dtype=np.bool_)
    kept[removed] = False
    return kept


def _seed(run: Run, purpose: str) -> int:
    """A seed apart from the ensemble's own, for each purpose."""
    words = [run.config.ensemble.seed, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0] & 0x7FFFFFFF)
