"""What scoring the models of earlier epochs is worth, through HTTP, on the backdoor's data.

    python tests/benchmarks/checkpoints.py FOLDER [--ensembles 3] [--subsets 64]

Runs of 24 members with ``ensemble.checkpoints: 3`` on the embedded server, each with another seed. From their losses,
with and without those of the earlier epochs: LDS against models retrained on random halves (the first run's truth
serves all), self_lds, and the average precision of planted examples and of each answer's own source. Rerun the command
to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from daunce_api import Attribution, Run, RunConfig
from daunce_api.cli.demo.experiment import demo_config
from daunce_api.evaluation.experiments import lds_truth
from daunce_api.evaluation.lds import lds
from daunce_api.evaluation.retraining import question_losses
from daunce_api.evaluation.retrieval import average_precision

MEMBERS = (8, 12, 16, 24)
DATA = Path(__file__).parents[2] / "examples" / "uses" / "backdoor"


def config_of(folder: Path, seed: int) -> RunConfig:
    """The backdoor's data with the demo's recipe, another seed and three models of each job."""
    plain = demo_config(folder / f"ensemble-{seed}", max(MEMBERS))
    data = plain.data.model_copy(update={side: DATA / f"{side}.jsonl" for side in ("train", "test")})
    shape = plain.ensemble.model_copy(update={"checkpoints": 3, "seed": seed})
    backend = plain.backend.model_copy(update={"options": {"workers": 1}})
    return plain.model_copy(update={"data": data, "ensemble": shape, "backend": backend})


def figures(attribution: Attribution, subset_SN: np.ndarray, loss_SM: np.ndarray) -> dict[str, float | str]:
    """Everything that is compared, of one attribution."""
    score = attribution.scores_NM()
    sources = np.array(attribution.labels("train"))
    precisions: dict[bool, list[float]] = {True: [], False: []}
    for j, source in enumerate(attribution.labels("test")):
        precisions[source == "planted"].append(average_precision(score[:, j], sources == source))
    planted, own = float(np.mean(precisions[True])), float(np.mean(precisions[False]))
    quality = attribution.self_lds
    covariance = attribution.with_estimator("covariance").scores_NM()
    return {
        "lds": lds(score, subset_SN, loss_SM).value,
        "lds_covariance": lds(covariance, subset_SN, loss_SM).value,
        "self_lds": float("nan") if quality is None else quality.value,
        "planted": planted,
        "own_source": own,
        "estimator": attribution.choice.estimator.name,
    }


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ensembles", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=64)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    attributions, run = [], None
    for seed in range(1, asked.ensembles + 1):
        start = time.monotonic()
        run = Run.create(config_of(folder, seed))
        attributions.append(run.execute())
        print(f"ensemble {seed}: {time.monotonic() - start:.0f} s in this call", flush=True)
    first = Run.create(config_of(folder, 1))
    truth = lds_truth(first, subsets=asked.subsets)
    truth.measure()
    measured = question_losses(truth)
    print(f"truth: {len(measured.models)} models", flush=True)
    subset, loss = measured.by_subset()
    rows = []
    for members in MEMBERS:
        for seed, whole in enumerate(attributions, start=1):
            part = whole.first(members)
            for kind, attribution in (("final", replace(part, earlier=None)), ("checkpoints", part)):
                found = figures(attribution, subset, loss)
                rows.append({"members": members, "seed": seed, "rows": kind, **found})
    (folder / "checkpoints.json").write_text(json.dumps(rows, indent=1))
    print(f"{'K':>3} {'rows':<12} {'LDS':>6} {'cov':>6} {'self':>6} {'planted':>8} {'source':>7}  estimators")
    names = ("lds", "lds_covariance", "self_lds", "planted", "own_source")
    for members in MEMBERS:
        for kind in ("final", "checkpoints"):
            cell = [r for r in rows if r["members"] == members and r["rows"] == kind]
            means = [float(np.mean([float(r[name]) for r in cell])) for name in names]
            used = sorted({str(r["estimator"]) for r in cell})
            print(
                f"{members:>3} {kind:<12} {means[0]:6.3f} {means[1]:6.3f} {means[2]:6.3f} {means[3]:8.3f} "
                f"{means[4]:7.3f}  {', '.join(used)}"
            )


if __name__ == "__main__":
    main()
