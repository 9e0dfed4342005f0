"""Paths of checkpoints, in the one form that every service takes: ``tinker://RUN/KIND/NAME``.

Servers write them differently: without ``sampler_weights/`` in the path of a saved sampler, with or without it in the
id of a listed checkpoint.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["weights", "sampler_weights"]
SCHEME = "tinker://"
FINAL, EPOCH, STATE, AGAIN = "daunce-final", "daunce-epoch-", "daunce-state-", "daunce-again"
"""Names: of a member's end, of its models before that and its optimiser states by epoch, of weights that were loaded
again to be scored."""


def path_of(run: str, kind: Kind, name: str) -> str:
    """The path of a checkpoint of a training run."""
    return f"{SCHEME}{run}/{kind}/{name}"


def parts_of(path: str) -> tuple[str, str]:
    """Training run and name in a path of either form. Raises ValueError for anything else."""
    run, _, rest = path.removeprefix(SCHEME).partition("/")
    name = rest.rsplit("/", 1)[-1]
    if not path.startswith(SCHEME) or not run or not name:
        raise ValueError(f"{path!r} is no path of a checkpoint (tinker://RUN/sampler_weights/NAME)")
    return run, name


def state_path(path: str) -> str:
    """The path of the training state that was saved beside the sampler's weights, of a member's end or of an epoch."""
    run, name = parts_of(path)
    return path_of(run, "weights", name.replace(EPOCH, STATE, 1) if name.startswith(EPOCH) else name)


def epoch_name(prefix: str, epoch: int) -> str:
    """Name of what is saved after an epoch, from 1; zeros in front make names sort as epochs do."""
    return f"{prefix}{epoch:04}"


def is_sampler(checkpoint: Any) -> bool:
    """Whether a listed checkpoint is a sampler's weights."""
    kind = getattr(checkpoint, "checkpoint_type", None)
    return str(kind) == "sampler" if kind is not None else str(checkpoint.checkpoint_id).startswith("sampler_weights/")


def listed_name(checkpoint: Any) -> str:
    """The name of a listed checkpoint."""
    return str(checkpoint.checkpoint_id).rsplit("/", 1)[-1]
