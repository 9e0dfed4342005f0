"""Money: estimates against what the server counts, a cap that holds, and a clean that takes what is ours alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from daunce_api import Run, RunConfig
from daunce_api.errors import BudgetError
from daunce_api.store import RunStore

from .harness import MEMBERS, Client, Provider, encoded_ids, jobs_of
from .proxy import Sent

MakeClient = Callable[..., tuple[RunConfig, Client]]


def test_planned_tokens_are_those_that_the_server_counts(
    provider: Provider, make_client: MakeClient, key: None
) -> None:
    """Within 2 % on the embedded model, and what is booked is the plan's price."""
    config, client = make_client()
    plan = Run.create(config).plan()
    provider.proxy.sent.clear()
    assert client.run() == 0
    trained = sum(job.trained_tokens for job in jobs_of(provider, config.run_dir))
    assert trained == pytest.approx(plan.total_training_tokens, rel=0.02)
    examples = encoded_ids(config)
    counted = sum(
        json.loads(s.answer)["usage"]["prompt_tokens"]
        for s in provider.proxy.sent
        if s.route == "POST /v1/completions" and {tuple(ids) for ids in json.loads(s.body)["prompt"]} <= examples
    )
    once = plan.scoring_input_tokens * plan.scored_models
    assert counted == pytest.approx(once + plan.again_tokens[0] * plan.members, rel=0.02)
    # The endpoint's tests, of each model and of the base, are counted at what any of them may send.
    tests = sum(
        json.loads(s.answer)["usage"]["total_tokens"]
        for s in provider.proxy.sent
        if s.route == "POST /v1/completions" and not {tuple(ids) for ids in json.loads(s.body)["prompt"]} <= examples
    )
    assert 0 < tests <= (plan.scored_models + 1) * plan.test_tokens
    with RunStore.open(config.run_dir, read_only=True) as store:
        assert plan.usd is not None
        assert store.ledger.spent() == pytest.approx(plan.usd, rel=0.02)


def test_a_cap_below_the_whole_run_is_kept_through_failures(
    provider: Provider, make_client: MakeClient, key: None
) -> None:
    """The plan fits, but retries of a server that spoils models would not: the run ends before the cap is passed."""
    config, _ = make_client()
    usd = Run.create(config).plan().usd
    assert usd is not None
    cap = round(usd * 1.3, 6)
    capped, client = make_client(budget={"max_usd": cap}, training={"max_attempts": 10})
    seen: dict[str, int] = {}

    def gone(sent: Sent) -> tuple[int, bytes] | None:
        """Every model is gone at its fifth request, and is never found again."""
        model = json.loads(sent.body)["model"] if sent.route == "POST /v1/completions" else sent.path.rpartition("/")[2]
        if not model.startswith("ft:"):
            return None
        seen[model] = seen.get(model, 0) + (sent.method == "POST")
        if seen[model] < 5:
            return None
        return 404, json.dumps({"error": {"message": "gone", "code": "model_not_found", "type": "x"}}).encode()

    provider.proxy.refuse = gone
    assert client.run() == 3, client.printed()
    assert "budget.max_usd" in client.printed()
    assert "Traceback" not in client.printed()
    with RunStore.open(capped.run_dir, read_only=True) as store:
        assert store.ledger.spent() <= cap
        # What was really trained, at the config's price, is within the cap too.
        price = capped.budget.price
        assert price is not None
        assert price.training is not None
        trained = sum(job.trained_tokens or 0 for job in jobs_of(provider, capped.run_dir))
        assert trained * price.training / 1e6 <= cap


def test_clean_takes_what_the_run_made_and_says_what_it_could_not(
    provider: Provider, make_client: MakeClient, tmp_path: Path
) -> None:
    api = provider.api()
    bystander = api.files.create(
        file=("daunce-lookalike.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune"
    )
    models, files = {m.id for m in api.models.list()}, {f.id for f in api.files.list()}
    assert bystander.id in files
    config, client = make_client()
    assert client.run() == 0
    own = {m.id for m in api.models.list()} - models
    assert len(own) == MEMBERS
    stubborn = sorted(own)[0]
    refusal = json.dumps({"error": {"message": "in use by a deployment", "type": "x", "code": "conflict"}}).encode()
    provider.proxy.refuse = lambda s: (403, refusal) if s.method == "DELETE" and stubborn in s.path else None
    clean = Client(["clean", str(config.run_dir), "--yes", "--json"], tmp_path / "clean.txt")
    code = clean.run()
    printed = clean.printed()
    assert "Traceback" not in printed
    assert code == 0
    assert json.loads(printed)["kept"] == {stubborn: "the provider keeps the model"}
    assert stubborn in {m.id for m in api.models.list()}
    provider.proxy.refuse = None
    assert Client(["clean", str(config.run_dir), "--yes"], tmp_path / "again.txt").run() == 0
    assert {m.id for m in api.models.list()} == models
    assert {f.id for f in api.files.list() if f.purpose == "fine-tune"} >= {bystander.id}
    assert not [f for f in api.files.list() if f.id not in files and f.purpose == "fine-tune"]


DOLLARS = st.integers(0, 300).map(lambda cents: cents / 100)
SUBJECTS = st.sampled_from(["job 0", "job 1", "job 2", "scoring of member 0", "scoring of member 1"])


class CappedLedger(RuleBasedStateMachine):
    """Reservations, settlements below what was reserved, refusals and deaths in any order."""

    @initialize(cap=DOLLARS)
    def begin(self, cap: float) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="daunce-ledger-"))
        self.cap = cap
        self.open: dict[str, float] = {}
        self.billed: dict[str, float] = {}
        self.store = RunStore.create_or_open(self.folder, {})

    @rule(subject=SUBJECTS, usd=DOLLARS)
    def reserve(self, subject: str, usd: float) -> None:
        try:
            self.store.ledger.reserve(subject, usd, purpose="train", cap=self.cap)
        except BudgetError:
            assert sum(self.open.values()) + sum(self.billed.values()) + usd > self.cap - 1e-9
        else:
            self.open.setdefault(subject, usd)

    @rule(subject=SUBJECTS, share=st.floats(0, 1))
    def settle(self, subject: str, share: float) -> None:
        """What is billed is at most what was reserved, on top of what the subject was billed before."""
        if subject in self.open:
            self.billed[subject] = self.billed.get(subject, 0.0) + round(self.open.pop(subject) * share, 6)
            self.store.ledger.settle(subject, self.billed[subject])

    @rule()
    def die(self) -> None:
        self.store.close()
        self.store = RunStore.create_or_open(self.folder, {})

    @invariant()
    def the_cap_holds_and_nothing_is_forgotten(self) -> None:
        if not hasattr(self, "store"):
            return
        expected = sum(self.open.values()) + sum(self.billed.values())
        assert self.store.ledger.spent() == pytest.approx(expected, abs=1e-6)
        assert self.store.ledger.spent() <= self.cap + 1e-6
        assert self.store.ledger.unsettled().keys() == self.open.keys()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


_COMMON: dict[str, Any] = {"print_blob": True}


class TestCappedLedger(CappedLedger.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=40, stateful_step_count=20, **_COMMON)


@pytest.mark.long
class TestCappedLedgerLong(CappedLedger.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=400, stateful_step_count=40, **_COMMON)
