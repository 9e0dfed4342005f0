"""How long members train relative to the target, in learning-rate time: rho of METHOD item 6 in :mod:`daunce_api.core`.

rho = (member's steps x mean learning rate) / (target's steps x mean learning rate), from what the two recipes say and
from the defaults that this package or a provider's documentation fixes. It is unknown where a provider chooses a value
by the size of the file, and where the recipes differ in anything that makes their steps incomparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

from ..config import RunConfig
from .objective import Objective
from .tinker.loops import Recipe as TinkerRecipe
from .together.trainer import DEFAULTS as TOGETHER

Rho: TypeAlias = float | Literal["base", "unknown"]
Recipe: TypeAlias = Mapping[str, Any]

_LANGUAGE = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
_CLASSIFIER = {
    "n_epochs": 1,
    "batch_size": 25,
    "learning_rate": 0.1,
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
}
_LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_targets": None}
_DEFAULTS: Mapping[str, Recipe] = {
    "embedded": _LANGUAGE,
    "tinker": asdict(TinkerRecipe()),
    "together": {**TOGETHER, "gradient_accumulation_steps": 1, "min_lr_ratio": 0.0, "warmup_ratio": 0.0},
    # Defaults that the model fixes, not the file: the same number in both recipes, whatever it is.
    "fireworks": {
        "gradient_accumulation_steps": 1,
        "learning_rate_warmup_steps": 0,
        "batch_size": "the same",
        "learning_rate": "the same",
    },
    "nebius": {"n_epochs": 3, "batch_size": 8, "learning_rate": 1e-5, "warmup_ratio": 0.0},
}
_LOCAL_RATE = {"lora": 1e-3, "full": 5e-5}
_MEAN_RATE = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}
_EPOCHS = ("n_epochs", "epochs")
_PROPORTIONAL = {"batch_size": -1, "batch_size_samples": -1, "gradient_accumulation_steps": -1}
_RATES = {"learning_rate": 1, "learning_rate_multiplier": 1}
_SCHEDULE = frozenset({"schedule", "momentum", "lr_scheduler_type", "min_lr_ratio", "warmup_ratio"})


def rho_of(config: RunConfig, n_train: int) -> Rho:
    """rho of a run's members: a number, "base" for members that are trained like the target, "unknown" where the
    recipes do not say.

    A target that was trained elsewhere has no known recipe. Members of the objective ``fisher`` count as "base": its
    curvature is that of squared margins, which no p (1 - p) damps, so that its members are not short where the target's
    would be (with rho, LDS was .05 lower on digits and the same on Fashion-MNIST).
    """
    if config.ensemble.start_from != "target":
        return "base"
    if config.backend.kind == "local" and Objective.of_options(config.backend.options).kind == "fisher":
        return "base"
    if config.ensemble.target_model is not None:
        return "unknown"
    given = config.training.hyperparameters
    target = config.training.target_hyperparameters
    member_time = _recipe(config, given)
    target_time = _recipe(config, given if target is None else target)
    subset = round(config.ensemble.subset_ratio * n_train)
    return _ratio(member_time, target_time, subset, n_train) or "unknown"


def _recipe(config: RunConfig, given: Recipe) -> dict[str, Any]:
    """What a job does, defaults included; "auto" is a default."""
    kind, options = config.backend.kind, config.backend.options
    defaults: dict[str, Any] = dict(_DEFAULTS.get(kind, {}))
    if kind == "local":
        fine_tuning = str(options.get("fine_tuning", "lora"))
        defaults = (
            dict(_CLASSIFIER) if options.get("task") else {**_LANGUAGE, **(_LORA if fine_tuning == "lora" else {})}
        )
    recipe = {**defaults, **{name: value for name, value in given.items() if value != "auto"}}
    if kind == "local" and "learning_rate" in given and "learning_rate_multiplier" in recipe:
        base = _LOCAL_RATE.get(str(options.get("fine_tuning", "lora")), 1e-3)
        recipe["learning_rate_multiplier"] = float(recipe.pop("learning_rate")) / base
    if kind in ("local", "embedded"):  # a linear warm-up to the peak of a cosine has the same mean, .5
        recipe.pop("warmup_ratio", None)
    return recipe


def _ratio(member: dict[str, Any], target: dict[str, Any], subset: int, n_train: int) -> float | None:
    known = set(member) | set(target)
    rates, epochs = known & set(_RATES), known & set(_EPOCHS)
    if len(rates) != 1 or len(epochs) != 1 or not known & {"batch_size", "batch_size_samples"}:
        return None
    if float(member.get("learning_rate_warmup_steps", 0)) or float(target.get("learning_rate_warmup_steps", 0)):
        return None  # the same number of steps takes more of a short run
    here, there = _reach(member), _reach(target)
    if member.keys() != target.keys() or here is None or there is None:
        return None
    ratio = 1.0
    for name in known:
        a, b = member[name], target[name]
        power = _PROPORTIONAL.get(name, 1 if name in rates | epochs else 0)
        if a == b or (not power and name in _SCHEDULE):
            continue
        if not power or not all(isinstance(x, int | float) and x > 0 for x in (a, b)):
            return None
        ratio *= (a / b) ** power
    batches = [r.get("batch_size", r.get("batch_size_samples")) for r in (member, target)]
    steps = subset / n_train
    if "gradient_accumulation_steps" not in known and all(isinstance(b, int) and 0 < b <= n_train for b in batches):
        whole = [math.ceil(n / int(b or 1)) * int(b or 1) for n, b in zip((subset, n_train), batches, strict=True)]
        steps = whole[0] / whole[1]  # an epoch's last batch may be short, but it is a step
    return float(ratio * steps * here / there)


def _reach(recipe: Recipe) -> float | None:
    """How far a step at peak rate 1 goes on average: the schedule, its warm-up, and momentum, which repeats each step
    1 / (1 - momentum) times. None where the recipe says something that is not known here."""
    schedule = recipe.get("schedule", recipe.get("lr_scheduler_type", "constant"))
    rate, momentum = _MEAN_RATE.get(str(schedule)), recipe.get("momentum", 0.0)
    lowest, warmup = recipe.get("min_lr_ratio", 0.0), recipe.get("warmup_ratio", 0.0)
    if rate is None or not all(isinstance(x, int | float) and 0 <= x < 1 for x in (momentum, lowest, warmup)):
        return None
    if "lr_scheduler_type" in recipe:
        rate = 0.5 + 0.5 * float(lowest)
    return float((warmup / 2 + (1 - warmup) * rate) / (1 - momentum))
