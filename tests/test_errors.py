"""The tree of errors: its drawing, exit codes, pickling, messages."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re
from typing import Any

import pytest

from daunce_api import errors
from daunce_api.errors import (
    DataError,
    DaunceError,
    MembersAlikeError,
    MissingExtraError,
    RunLockedError,
    TransientError,
)

CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, DaunceError)}


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """name -> (parent, built-in in brackets), read off the tree in the module's docstring."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}([│├└─ ]*)([A-Z]\w+Error)(?:\((\w+)\))?", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        path = [*path[:depth], match[2]]
        tree[match[2]] = (path[-2] if depth else None, match[3])
    return tree


def test_the_drawing_is_the_tree() -> None:
    found: dict[str, tuple[str | None, str | None]] = {}
    for name, kind in CLASSES.items():
        ours = [b.__name__ for b in kind.__bases__ if issubclass(b, DaunceError)]
        builtin = [b.__name__ for b in kind.__bases__ if hasattr(builtins, b.__name__) and b is not Exception]
        found[name] = (ours[0] if ours else None, builtin[0] if builtin else None)
    assert drawn() == found
    assert len(found) > 15


def make(kind: type[DaunceError]) -> DaunceError:
    arguments: dict[str, Any] = {"message": "what happened", "what": "reports", "extra": "report"}
    required = [
        p.name
        for p in inspect.signature(kind.__init__).parameters.values()
        if p.name in arguments and p.default is inspect.Parameter.empty
    ]
    return kind(**{n: arguments[n] for n in required}) if required else kind("what happened")


@pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda k: k.__name__)
def test_every_error_survives_pickling_and_copying(kind: type[DaunceError]) -> None:
    error = make(kind)
    error.add_note("seen in a worker")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert type(again) is kind
        assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)


@pytest.mark.parametrize(
    ("error", "attribute", "value"),
    [
        (TransientError("wait", retry_after=2.5), "retry_after", 2.5),
        (RunLockedError("busy", pid=41), "pid", 41),
        (MembersAlikeError("alike", [1, 2]), "members", (1, 2)),
        (DataError("bad", ["a:1: x", "a:2: y"]), "problems", ("a:1: x", "a:2: y")),
        (MissingExtraError("the server", "server"), "extra", "server"),
    ],
)
def test_what_an_error_knows_survives_pickling(error: DaunceError, attribute: str, value: Any) -> None:
    assert getattr(pickle.loads(pickle.dumps(error)), attribute) == value  # noqa: S301 - our own bytes


def test_messages_name_what_to_do() -> None:
    assert str(DataError("train.jsonl has problems", ["train.jsonl:3: empty"])) == (
        "train.jsonl has problems\n  train.jsonl:3: empty"
    )
    assert "pip install 'daunce-api[server]'" in str(MissingExtraError("the server", "server"))


def test_exit_codes() -> None:
    """0 is success, 1 anything else; 130 is left to Ctrl-C."""
    assert {name: kind.exit_code for name, kind in CLASSES.items()} == {
        **dict.fromkeys(["DaunceError", "TrainingCancelledError"], 1),
        **dict.fromkeys(["ConfigurationError", "DataError", "MissingExtraError"], 2),
        **dict.fromkeys(["CapabilityError", "BudgetError"], 3),
        **dict.fromkeys(
            ["StoreError", "RunLockedError", "RunChangedError", "StoreCorruptError", "UnknownJobsError"], 4
        ),
        **dict.fromkeys(["ProviderError", "TransientError", "AmbiguousSubmitError", "RejectedError"], 5),
        **dict.fromkeys(["StopError", "HeldJobError", "ContractError", "MembersAlikeError"], 5),
        "DailyLimitError": 6,
        "NotEnoughMembersError": 7,
        "ReplayError": 8,
    }


def test_every_class_is_documented() -> None:
    assert all((kind.__doc__ or "").strip() for kind in CLASSES.values())
