"""Ours: from the cached losses of black-box members, and with white-box members of the local backend."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from daunce_api.core import Checkpoints, scores
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings, Members
from daunce_api.providers.objective import Objective
from tests.benchmarks.estimators import similarity
from tests.benchmarks.field.cells import Method, Result, read_cell
from tests.benchmarks.field.subjects import Subject
from tests.benchmarks.tasks import CACHE, CHUNK, Recipe, _number, _subset, chunk_files, joined, read_chunk

COUNTS = (10, 25, 50, 100)
ENSEMBLES = 3
TIMED = {"digits": 50, "fashion": 50, "resnet": 16, "lm": 10}  # members that are trained for the figure of seconds
BLACK, WHITE = "fine-tuning and scoring by API", "weights, gradients"


def black_box(
    subject: Subject, start: str, count: int, estimator: str, checkpoints: bool = False, prior: bool = False
) -> Result:
    """Scores of up to three disjoint ensembles of K members."""
    folder = CACHE / subject.name / start
    files = [chunk_files(folder, first) for first in range(0, subject.task.kinds[start].count, CHUNK)]
    if checkpoints:
        files = [pair for pair in files if pair[1].exists()]
    held = [read_chunk(pair) for pair in files if pair[0].exists()]
    found = joined(held) if held else {"train": np.empty(0)}
    if len(found["train"]) < count:
        raise ValueError(f"fewer than {count} members are in the cache")
    rho = subject.task.rho(start)
    prior_NM = similarity(subject.task) if prior else None
    out = []
    for index in range(min(ENSEMBLES, len(found["train"]) // count)):
        rows = slice(index * count, (index + 1) * count)
        earlier = None
        if checkpoints:
            earlier = Checkpoints(found["earlier_train"][:, rows], found["earlier_test"][:, rows])
        arrays = (found["train"][rows], found["test"][rows], found["inclusion"][rows])
        out.append(scores(*arrays, estimator, rho=rho, earlier=earlier, prior_NM=prior_NM))
    stored = read_cell(subject.name, f"members-from-{start}{'--with-checkpoints' if checkpoints else ''}")
    if stored is None:
        raise ValueError(f"members from {start} are not timed yet")
    timed = stored["rows"][0]
    return Result(out, count * timed["seconds_each"], f"members' peak {timed['peak_mib']:.0f} MiB")


def time_members(subject: Subject, start: str, checkpoints: bool = False) -> Result:
    """Train a few members as the cached ones were trained; their seconds are multiplied by K."""
    kind = subject.task.kinds[start]
    count = TIMED[subject.name]
    subsets = np.stack([_subset(subject.task, start, i) for i in range(count)])
    seeds = np.array([_number(subject.task.name, start, i) for i in range(count)])
    owner: Any = subject.task.train.__self__  # type: ignore[attr-defined]
    if subject.name == "lm":
        owner._adapters(start, 1)
    elif subject.name == "resnet":
        owner.target()
    else:
        owner.start(start, 1, seeds[:1])
    points = kind.recipe.checkpoints(int(subsets[0].sum())) if checkpoints else []
    began = time.process_time()
    subject.task.train(kind.start, kind.recipe, subsets, seeds, points)
    return Result([], (time.process_time() - began) / count, f"{count} members")


def white_box(
    subject: Subject,
    objective: str,
    count: int,
    estimator: str = "auto",
    rho: float = 1.0,
    rate: float = 0.03,
    epochs: int = 1,
    ratio: float = 0.3,
) -> Result:
    """Members that minimise a perturbed objective around the target."""
    rng = np.random.default_rng([20, count])
    size = len(subject.train[0])
    inclusion = np.zeros((count, size), dtype=bool)
    for row in inclusion:
        row[rng.permutation(size)[: round(ratio * size)]] = True
    goal = Objective(objective, rho=rho)  # type: ignore[arg-type]
    seeds = list(range(5000, 5000 + count))
    began = time.process_time()
    if subject.texts is None:
        train, test = _image_members(subject, inclusion, seeds, goal, rate, epochs)
    else:
        train, test = _text_members(subject, inclusion, seeds, goal, rate, epochs)
    trained = time.process_time() - began
    target = subject.task.target
    member = Recipe(epochs, target.batch, rate, 0.9 if subject.texts is None else 0.0, "cosine")
    learning_time = float(member.rates(round(ratio * size)).sum() / target.rates(size).sum())
    learning_time *= (1 - target.momentum) / (1 - member.momentum)
    design_KN = goal.weights_KN(inclusion, np.array(seeds))
    # As a run has it: members of squared margins are not short (`providers.learning_time`).
    found = scores(train, test, design_KN, estimator, rho="base" if objective == "fisher" else learning_time)
    return Result([found], 0.0, f"{trained:.1f} s for members")


def _image_members(
    subject: Subject, inclusion: np.ndarray, seeds: list[int], goal: Objective, rate: float, epochs: int
) -> tuple[np.ndarray, np.ndarray]:
    classifier = Classifier(partial(copy.deepcopy, subject.model))
    settings = ClassifierSettings(
        n_epochs=epochs,
        batch_size=subject.task.target.batch,
        learning_rate=rate,
        momentum=0.9,
        schedule="cosine",
    )
    start = {n: t.clone() for n, t in subject.loaded(subject.target or {}).state_dict().items()}
    members: Members = classifier.train(*subject.train, inclusion, seeds, settings, start=start, objective=goal)
    return classifier.measure(members, *subject.train), classifier.measure(members, *subject.test)


def _text_members(
    subject: Subject, inclusion: np.ndarray, seeds: list[int], goal: Objective, rate: float, epochs: int
) -> tuple[np.ndarray, np.ndarray]:
    import daunce_api
    from daunce_api.data.dataset import Dataset
    from daunce_api.data.tokenizers import encode_example
    from daunce_api.providers.local.language import LanguageModel
    from daunce_api.providers.local.options import LoraSettings
    from daunce_api.providers.local.train import LoraTrainee, Member, fine_tune

    model = LanguageModel.load("daunce-tiny")
    data = Dataset.from_jsonl(f"{next(iter(daunce_api.__path__))}/../examples/uses/backdoor/train.jsonl")
    examples = [encode_example(e, model.tokenizer) for e in data]
    settings = LoraSettings(
        n_epochs=epochs, batch_size=8, learning_rate=rate, warmup_ratio=0.03, targets=("q_proj", "v_proj")
    )
    shapes = model.adapter_shapes(settings.targets)
    target = subject.target or {}
    start = {name: (target[f"inner.{name}.a.weight"], target[f"inner.{name}.b.weight"]) for name in shapes}
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for first in range(0, len(seeds), 10):
        rows = range(first, min(first + 10, len(seeds)))
        group = [Member([examples[i] for i in np.flatnonzero(inclusion[k])], seeds[k]) for k in rows]
        trainee = LoraTrainee(model.adapted, group, shapes, settings, start)
        fine_tune(model.adapted, trainee, settings, objective=goal)
        for k in range(len(group)):
            one = trainee.weights(k)
            state = {f"inner.{n}.{'ab'[i]}.weight": w for n, pair in one.items() for i, w in enumerate(pair)}
            subject.loaded(state)
            for side, (x, y) in zip(sides, (subject.train, subject.test), strict=True):
                with torch.no_grad():
                    parts = [subject.losses(subject.model(a), b) for a, b in zip(x.split(40), y.split(40), strict=True)]
                side.append(torch.cat(parts).numpy())
    subject.loaded(target)
    return np.stack(sides[0]), np.stack(sides[1])


IMAGES = {"rho": 1.0, "rate": 0.03, "epochs": 1}  # the paper's settings
TEXT = {"rho": 10.0, "rate": 1e-3, "epochs": 1}


def _white(objective: str, count: int) -> tuple[Method, ...]:
    """Two settings of one method: the paper's for images and for language models."""
    name = f"white box, {objective}, auto, K = {count}"
    fixed = {"objective": objective, "count": count}
    images = Method(
        name,
        WHITE,
        white_box,
        fixed | IMAGES,
        tuple(
            fixed | IMAGES | more
            for more in ({"epochs": 3}, {"epochs": 6}, {"epochs": 3, "rate": 0.1}, {"rate": 0.003})
        ),
        refuses=lambda task: "text" if task == "lm" or (task == "resnet" and count > 100) else "",
    )
    text = Method(
        name,
        WHITE,
        white_box,
        fixed | TEXT,
        tuple(fixed | TEXT | more for more in ({"epochs": 4}, {"rate": 5e-3}, {"rate": 5e-3, "epochs": 4})),
        refuses=lambda task: "" if task == "lm" and count <= 100 else "run with the two MLPs alone",
    )
    return images, text


TIMINGS = tuple(
    Method(
        f"members from {start}{', with checkpoints' if more else ''}",
        BLACK,
        time_members,
        {"start": start, "checkpoints": more},
    )
    for start in ("base", "target")
    for more in (False, True)
)
METHODS = (
    *(
        Method(
            f"black box, from {start}, {estimator}, K = {count}",
            BLACK,
            black_box,
            {"start": start, "count": count, "estimator": estimator},
        )
        for start in ("base", "target")
        for estimator in ("covariance", "auto")
        for count in COUNTS
    ),
    *(
        Method(
            f"black box, from {start}, auto + {extra}, K = {count}",
            BLACK,
            black_box,
            {"start": start, "count": count, "estimator": "auto", extra: True},
        )
        for extra in ("checkpoints", "prior")
        for start in ("base", "target")
        for count in COUNTS
    ),
    *(method for objective in ("influence", "fisher") for count in (100, 400) for method in _white(objective, count)),
)
