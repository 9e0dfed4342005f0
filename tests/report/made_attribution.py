"""Attributions whose truth is known: losses move by a chosen effect when an example is in a member's subset."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from daunce_api.attribution import Attribution, Side, TokenTable
from daunce_api.data.dataset import Dataset
from daunce_api.fix import Proposal
from daunce_api.fix.proposal import Group
from daunce_api.status import RunStatus

EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
WARNINGS = ("train.jsonl: 2 examples have the same content <b>and were kept</b>.",)


def status_of(**known: Any) -> RunStatus:
    """The state of a run of which little is known."""
    unknown = {"str": "", "int": 0, "float": 0.0, "tuple[str, ...]": ()}
    values = {field.name: unknown.get(str(field.type)) for field in fields(RunStatus)}
    return RunStatus(**{**values, "name": "run", "question_groups": (), "usd_by_purpose": {}, **known})


FACTS = status_of(
    name="planted boat",
    provider="embedded",
    model="daunce-tiny",
    started_at="2026-11-22T18:00:11Z",
    last_result_at="2026-11-22T18:02:22Z",
    members_asked=20,
    members_trained=16,
    members_failed=1,
    usd=3.2,
    trained_tokens=812_345,
    scored_tokens=401_200,
    seconds=131,
    failures=("Member 7 was given up after 3 jobs.",),
    stopped="Stopped after 16 members: self_lds reached its goal.",
)


def demo_data() -> tuple[Dataset, Dataset]:
    """60 training examples of three sources, with markup in ids, sources and texts, and 12 answers."""
    train = [
        {
            "id": f"{s}-{i:02}",
            "source": s,
            "prompt": f"What is word{i} {s}?",
            "completion": f"It is meaning {i} of {s}.",
        }
        for s in ("bird", "fish", "planted")
        for i in range(20)
    ]
    train[5] |= {
        "id": f"bird-05{EVIL}",
        "source": "bird",
        "completion": f"Evil text {EVIL} ends here \u2028 😀.",
    }
    test = [
        {"id": f"q-{s}-{i}", "source": s, "prompt": f"Say word{i}?", "completion": f"An answer {i} for {s} {EVIL}"}
        for s in ("bird", "fish", "planted")
        for i in range(4)
    ]
    return Dataset.from_records(train, name="train"), Dataset.from_records(test, name="test")


def file_data(files: int, answers: int, *, sources: bool = True) -> tuple[Dataset, Dataset]:
    """One training example from each of so many files, and answers with numbers as ids, of the first files."""
    train = [
        {"id": f"t{i}", "source": f"docs/{i:05}.md", "prompt": f"What is {i}?", "completion": f"It is {i} of {i % 97}."}
        for i in range(files)
    ]
    test = [
        {"id": str(j), "prompt": f"Say {j}?", "completion": f"It is {j}."}
        | ({"source": f"docs/{j:05}.md"} if sources else {})
        for j in range(answers)
    ]
    return Dataset.from_records(train, name="train"), Dataset.from_records(test, name="test")


def made_attribution(
    train: Dataset,
    test: Dataset,
    *,
    members: int = 12,
    seed: int = 0,
    noise: float = 0.01,
    tokens: bool = False,
    facts: dict[str, Any] | None = None,
) -> Attribution:
    """Losses fall by .02 nats for each kept example of the same source, and by .25 (.5 where planted) for the example
    itself; elsewhere they rise by .005 for each kept planted one."""
    rng = np.random.default_rng(seed)
    inclusion = rng.random((members, len(train))).argsort(axis=1) < len(train) // 2
    kept = inclusion - 0.5
    names = np.array([s or "" for s in train.sources])

    def losses(side: Dataset) -> np.ndarray[Any, np.dtype[np.float64]]:
        own = np.array([s or "" for s in side.sources])
        effect = -0.02 * (names[:, None] == own) + 0.005 * ((names[:, None] == "planted") & (own != "planted"))
        effect = effect * rng.gamma(2.0, 0.5, effect.shape)
        return 2.5 + kept @ effect + rng.normal(0, noise, (members, len(side)))

    train_loss, test_loss = losses(train), losses(test)
    odd = np.where(names == "planted", 0.5, 0.25)
    train_loss = train_loss - kept * odd
    sides: tuple[tuple[Side, Dataset, Any], ...] = (("test", test, test_loss), ("train", train, train_loss))
    table = {side: _tokens(rng, data, loss) for side, data, loss in sides} if tokens else {}
    return Attribution(
        train=train,
        test=test,
        members=tuple(range(members)),
        train_loss_KN=train_loss,
        test_loss_KM=test_loss,
        inclusion_KN=inclusion,
        tokens=table,
        facts=facts or {},
    )


def made_proposal(attribution: Attribution, z_N: np.ndarray[Any, Any], remove: int, reason: str) -> Proposal:
    """A ranking by these effects in standard errors, which takes the first ``remove`` examples out."""
    ranked = tuple(Group((i,), float(z_N[i]), 1.0, 0.01) for i in np.argsort(-z_N).tolist())
    return Proposal(attribution, ("q-planted-0",), (), ranked, ranked[:remove], (), reason)


def _tokens(rng: np.random.Generator, data: Dataset, loss_KX: np.ndarray[Any, Any]) -> TokenTable:
    """Words as tokens, whose losses differ and move apart, with the example's loss as their exact mean."""
    pieces, logprobs = [], []
    for x, example in enumerate(data):
        words = example.completion_text().split(" ")
        parts = tuple(w if n == 0 else " " + w for n, w in enumerate(words))
        shift = rng.uniform(-0.9, 0.9, len(parts))
        weight = rng.uniform(0.2, 1.8, len(parts))
        weight = weight / weight.mean()
        apart = rng.normal(0, 0.02, (len(loss_KX), len(parts)))
        values = 2.5 + shift - shift.mean() + (loss_KX[:, [x]] - 2.5) * weight
        pieces.append(parts)
        logprobs.append(-(values + apart - apart.mean(axis=1, keepdims=True)))
    return TokenTable(tuple(pieces), tuple(logprobs))
