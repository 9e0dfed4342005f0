"""The run store: what is written is there after a crash, and nothing else is believed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api.config import RunConfig
from daunce_api.errors import BudgetError, RunChangedError, RunLockedError, StoreCorruptError, StoreError
from daunce_api.providers.base import JobStatus, TokenScores
from daunce_api.store import JobRow, LossRow, RunStore
from daunce_api.store.rows import FileRow, Transition
from tests.store_rows import by_key, put

MANIFEST: dict[str, Any] = {
    "config": {
        "name": "run",
        "data": {"train": "a.jsonl"},
        "ensemble": {"members": 24, "seed": 0, "stop": None},
        "budget": {"max_usd": 1.0},
        "backend": {"kind": "openai", "max_concurrent_jobs": None},
    },
    "train_digest": "t1",
}
SHA = "ab" * 32


def fixed_time() -> datetime:
    return datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.setattr("daunce_api.store.part.utc_now", fixed_time)
    with RunStore.create_or_open(tmp_path / "r", MANIFEST) as opened:
        yield opened


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A finished run folder that version 2fa6155 made."""
    folder = tmp_path / "old"
    shutil.copytree(Path(__file__).parents[2] / "fixtures" / "run-2fa6155" / "run", folder)
    return folder


def changed(section: str, key: str, value: Any) -> dict[str, Any]:
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in MANIFEST["config"].items()}
    config.setdefault(section, {})[key] = value
    return {**MANIFEST, "config": config}


def test_a_run_is_taken_up_as_it_was_left(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, MANIFEST, run_key="abc") as store:
        store.jobs.file_intent(SHA, "daunce.jsonl", 12)
        store.jobs.file_uploaded(SHA, "file-1")
        store.jobs.intent("abc-m0-a1", 0, 1, "{}")
        store.jobs.submitted("abc-m0-a1", "job-1")
        store.jobs.state("abc-m0-a1", JobStatus.SUCCEEDED, "ft:m", trained_tokens=7)
        store.jobs.intent("abc-m-1-a1", -1, 1, "{}")
        store.set_value("probe", {"sigma": 0.01})
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.run_key == "abc"
        assert store.manifest == MANIFEST
        assert store.jobs.files() == [FileRow(SHA, "daunce.jsonl", 12, "uploaded", "file-1")]
        assert store.jobs.rows() == [
            JobRow("abc-m-1-a1", -1, 1, "{}", "intent"),
            JobRow("abc-m0-a1", 0, 1, "{}", "succeeded", "job-1", "ft:m", None, 7),
        ]
        assert store.jobs.ready_models() == {0: "ft:m"}
        assert store.get_value("probe") == {"sigma": 0.01}
        assert store.get_value("nothing", 3) == 3


def test_run_keys_are_random_and_short_enough_for_file_names(tmp_path: Path) -> None:
    keys = set()
    for name in "ab":
        with RunStore.create_or_open(tmp_path / name, MANIFEST) as store:
            keys.add(store.run_key)
    assert len(keys) == 2
    assert all(len(k) == 12 and int(k, 16) >= 0 for k in keys)


def test_files_are_private_and_synced_fully(store: RunStore) -> None:
    with sqlite3.connect(store.run_dir / "run.sqlite") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous") == [(2,)]


@pytest.mark.parametrize(
    ("manifest", "difference"),
    [
        (changed("ensemble", "members", 12), "ensemble.members: 24 -> 12"),
        (changed("ensemble", "seed", 1), "ensemble.seed: 0 -> 1"),
        (changed("backend", "kind", "local"), "backend.kind: openai -> local"),
        (changed("backend", "extra", 1), r"backend.extra: \(not set\) -> 1"),
        ({**MANIFEST, "train_digest": "t2"}, "digest of the examples of data.train: t1 -> t2"),
    ],
)
def test_other_settings_or_data_are_refused_by_name(tmp_path: Path, manifest: dict[str, Any], difference: str) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST).close()
    with pytest.raises(RunChangedError, match=difference):
        RunStore.create_or_open(tmp_path, manifest)
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.manifest == MANIFEST


@pytest.mark.parametrize(
    "manifest",
    [
        changed("ensemble", "members", 32),
        changed("ensemble", "checkpoints", 3),
        changed("ensemble", "stop", {"self_lds": 0.7}),
        changed("budget", "max_usd", 5.0),
        changed("budget", "price", {"training": 1.0}),
        changed("backend", "max_concurrent_jobs", 3),
        changed("backend", "api_key_env", "KEY"),
        changed("data", "train", "elsewhere/a.jsonl"),
        changed("attribution", "estimator", "whitened"),
        changed("scoring", "concurrency", 3),
    ],
)
def test_settings_that_touch_nothing_done_may_change(tmp_path: Path, manifest: dict[str, Any]) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST).close()
    with RunStore.create_or_open(tmp_path, manifest) as store:
        assert store.manifest == manifest
        assert {t.after for t in store.transitions()} == {"created", "changed"}


def test_a_second_writer_in_this_process_is_refused(store: RunStore) -> None:
    with pytest.raises(RunLockedError) as caught:
        RunStore.open(store.run_dir)
    assert caught.value.pid == os.getpid()


HOLDER = """
    import sys, time
    from daunce_api.store import RunStore
    store = RunStore.create_or_open(sys.argv[1], {"a": 1}, run_key="left")
    store.jobs.intent("k", 0, 1, "{}")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_leaves_its_work_and_no_lock(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(RunLockedError, match=f"process {child.pid} is working") as caught:
            RunStore.create_or_open(tmp_path, {"a": 1})
        assert caught.value.pid == child.pid
        with RunStore.open(tmp_path, read_only=True) as reader:
            assert [j.key for j in reader.jobs.rows()] == ["k"]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunStore.create_or_open(tmp_path, {"a": 1}) as store:
        assert store.run_key == "left"
        assert [j.key for j in store.jobs.rows()] == ["k"]


def test_reading_needs_no_lock_and_cannot_write(store: RunStore) -> None:
    with RunStore.open(store.run_dir, read_only=True) as reader:
        store.set_value("later", 1)
        assert reader.get_value("later") == 1
        with pytest.raises(StoreError, match="readonly"):
            reader.set_value("x", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_run_in_a_read_only_folder_can_be_read(tmp_path: Path) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST, run_key="k").close()
    tmp_path.chmod(0o500)
    try:
        with RunStore.open(tmp_path, read_only=True) as reader:
            assert reader.run_key == "k"
    finally:
        tmp_path.chmod(0o700)


def test_a_closed_run_is_one_file_beside_its_lock_and_its_sequence(tmp_path: Path) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "run.sqlite", "sequence"]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        RunStore.open(tmp_path, read_only=True)


def test_an_attempt_is_recorded_once(store: RunStore) -> None:
    store.jobs.intent("k1", 3, 1, "{}")
    with pytest.raises(StoreError, match="attempt 1 of member 3 exists already"):
        store.jobs.intent("k2", 3, 1, "{}")
    with pytest.raises(StoreError, match="exists already"):
        store.jobs.intent("k1", 3, 2, "{}")


def test_transitions_tell_what_happened_when(store: RunStore) -> None:
    store.jobs.intent("k", 0, 1, "{}")
    store.jobs.submitted("k", "job-1")
    store.jobs.state("k", JobStatus.RUNNING)
    store.jobs.state("k", JobStatus.RUNNING)
    store.jobs.state("k", JobStatus.FAILED, error="bad file")
    store.note("interrupted", "by the user")
    time = "2026-11-22T12:00:00.000+00:00"
    assert store.transitions()[1:] == [
        Transition(time, "job k", "", "intent", ""),
        Transition(time, "job k", "intent", "queued", "job-1"),
        Transition(time, "job k", "queued", "running", ""),
        Transition(time, "job k", "running", "failed", "bad file"),
        Transition(time, "interrupted", "", "note", "by the user"),
    ]


def test_an_uploaded_file_is_not_forgotten_by_a_second_intent(store: RunStore) -> None:
    store.jobs.file_intent(SHA, "n", 3)
    store.jobs.file_uploaded(SHA, "file-1")
    store.jobs.file_intent(SHA, "n", 3)
    assert store.jobs.files() == [FileRow(SHA, "n", 3, "uploaded", "file-1")]
    store.jobs.file_deleted(SHA)
    store.jobs.file_intent(SHA, "n", 3)
    assert store.jobs.files() == [FileRow(SHA, "n", 3, "intent", None)]


def test_a_deleted_model_is_not_ready(store: RunStore) -> None:
    store.jobs.intent("k", 0, 1, "{}")
    store.jobs.state("k", JobStatus.SUCCEEDED, "m")
    store.jobs.model_deleted("k")
    assert store.jobs.ready_models() == {}


def test_scores_come_back_bit_for_bit(store: RunStore) -> None:
    scores = {
        "a": TokenScores((-0.1, -1e-300, -17.25)),
        "b": TokenScores((-3.0, -4.0), (False, True)),
        "c": TokenScores((-3.0,), (False,)),
    }
    put(store, 4, 0, "echo", scores)
    put(store, 4, 1, "echo", {"a": TokenScores((-0.2, 0.0, -1.0))})
    assert by_key(store, 4) == {**scores, "c": TokenScores((-3.0,))}
    assert by_key(store, 4).keys() == {"a", "b", "c"}
    assert by_key(store, 4, 1).keys() == {"a"}
    assert by_key(store, 5).keys() == set()


def test_the_first_measurement_stays(store: RunStore) -> None:
    put(store, 0, 0, "f", {"a": TokenScores((-1.0,))})
    put(store, 0, 0, "f", {"a": TokenScores((-2.0,)), "b": TokenScores((-3.0,))})
    assert by_key(store, 0) == {"a": TokenScores((-1.0,)), "b": TokenScores((-3.0,))}


def test_a_bad_batch_leaves_nothing(store: RunStore) -> None:
    with pytest.raises(StoreError, match="not finite"):
        put(store, 0, 0, "f", {"a": TokenScores((-1.0,)), "b": TokenScores((float("nan"),))})
    assert by_key(store, 0).keys() == set()


def test_two_scorers_do_not_mix(store: RunStore) -> None:
    put(store, 0, 0, "echo", {"a": TokenScores((-1.0,))})
    with pytest.raises(RunChangedError, match="scored with echo, and now with chat"):
        put(store, 1, 0, "chat", {"a": TokenScores((-1.0,))})
    assert by_key(store, 1).keys() == set()


def test_discarding_takes_one_member_with_all_replicates(store: RunStore) -> None:
    for member, replicate in ((0, 0), (0, 1), (1, 0)):
        put(store, member, replicate, "f", {"a": TokenScores((-1.0,))})
    store.scores.set_aside([0], "model gone", suspect=False)
    assert [by_key(store, m, r).keys() for m, r in ((0, 0), (0, 1), (1, 0))] == [set(), set(), {"a"}]


def test_scores_of_checkpoints_are_kept_apart_from_the_final_models(store: RunStore) -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 1)]
    for i, (member, replicate, checkpoint) in enumerate(places):
        put(store, member, replicate, "f", {"a": TokenScores((-float(i),))}, checkpoint)
        put(store, member, replicate, "f", {"a": TokenScores((-9.0,))}, checkpoint)  # the first one stays
    assert [by_key(store, *p)["a"].logprobs[0] for p in places] == [0.0, -1.0, -2.0, -3.0, -4.0]
    with pytest.raises(RunChangedError):
        put(store, 0, 0, "other", {"b": TokenScores((-1.0,))}, 2)
    store.scores.set_aside([0], "model gone", suspect=False)
    assert [by_key(store, *p).keys() for p in places] == [set(), set(), set(), set(), {"a"}]


def trained(store: RunStore, key: str = "k-m0-a1", attempt: int = 1) -> None:
    store.jobs.intent(key, 0, attempt, "{}")
    store.jobs.state(key, JobStatus.SUCCEEDED, f"ft:{key}")


def test_checkpoints_are_numbered_from_the_end(store: RunStore) -> None:
    assert store.jobs.earlier_models(0, 3) is None  # no job yet
    assert store.jobs.earlier_models(0, 1) == {}
    trained(store)
    assert store.jobs.checkpoints("k-m0-a1") is None
    assert store.jobs.earlier_models(0, 3) is None  # nobody asked the provider yet
    store.jobs.checkpoints_found("k-m0-a1", ["step-1", "step-2", "step-3"])
    assert store.jobs.earlier_models(0, 3) == {1: "step-3", 2: "step-2"}
    assert store.jobs.earlier_models(0, 9) == {1: "step-3", 2: "step-2", 3: "step-1"}
    store.jobs.checkpoint_gone("k-m0-a1", 1, "404")
    assert store.jobs.checkpoints("k-m0-a1") == ("step-1", "step-2", None)
    assert store.jobs.earlier_models(0, 3) == {2: "step-2"}
    with pytest.raises(StoreError, match="no checkpoint 4"):
        store.jobs.checkpoint_gone("k-m0-a1", 4, "404")


def test_a_job_without_checkpoints_is_not_asked_about_again(store: RunStore) -> None:
    trained(store)
    store.jobs.checkpoints_found("k-m0-a1", [])
    assert store.jobs.checkpoints("k-m0-a1") == ()
    assert store.jobs.earlier_models(0, 3) == {}


def test_nobody_waits_for_checkpoints_of_a_model_that_was_cleaned_up(store: RunStore) -> None:
    trained(store)
    store.jobs.model_deleted("k-m0-a1")
    assert store.jobs.earlier_models(0, 3) == {}
    trained(store, "k-m0-a2", 2)
    assert store.jobs.earlier_models(0, 3) is None


def test_a_run_of_2fa6155_is_read_as_it_is_and_taken_up(old_run: Path) -> None:
    with sqlite3.connect(old_run / "run.sqlite") as other:
        known = dict(other.execute("SELECT example_key, logprobs FROM scores WHERE member = 1 AND replicate = 0"))
        jobs = other.execute("SELECT COUNT(*) FROM jobs").fetchone()
    other.close()
    before = (old_run / "run.sqlite").read_bytes()
    facts = []
    for read_only in (True, False, True):
        with RunStore.open(old_run, read_only=read_only) as store:
            found = by_key(store, 1)
            assert {k: np.array(s.logprobs).tobytes() for k, s in found.items()} == known
            times = store.history.times()
            assert times.job_seconds > 0
            assert times.seconds > 0
            assert all(job.submitted_at and job.ended_at for job in store.jobs.rows())
            facts.append(
                (store.run_key, store.jobs.rows(), store.ledger.spent_by_purpose(), times, store.scores.models())
            )
            assert len(store.jobs.rows()) == jobs[0]
            if read_only:
                with pytest.raises(StoreError, match="readonly"):
                    store.set_value("x", 1)
        if len(facts) == 1:
            assert (old_run / "run.sqlite").read_bytes() == before
    assert facts[0] == facts[1] == facts[2]


def test_a_damaged_row_of_an_older_version_is_refused_and_the_file_left_alone(old_run: Path) -> None:
    with sqlite3.connect(old_run / "run.sqlite") as other:
        other.execute("UPDATE scores SET logprobs = x'0000000000000000' WHERE member = 2")
    other.close()
    before = (old_run / "run.sqlite").read_bytes()
    for read_only in (True, False):
        with pytest.raises(StoreCorruptError, match="checksum"):
            RunStore.open(old_run, read_only=read_only)
    assert (old_run / "run.sqlite").read_bytes() == before
    assert not list(old_run.glob("*.part"))


EDITS = {
    "UPDATE checkpoints SET models = '[]'": lambda s: s.jobs.checkpoints("k"),
    "UPDATE blobs SET checkpoint = 2 WHERE checkpoint = 1": lambda s: by_key(s, 0, checkpoint=2),
    "UPDATE blobs SET logprobs = x'0000000000000000'": lambda s: by_key(s, 0, checkpoint=1),
    "UPDATE jobs SET model = 'other'": lambda s: s.jobs.rows(),
    "UPDATE jobs SET request_json = CAST(x'7bff7d' AS TEXT)": lambda s: s.jobs.rows(),
    "UPDATE files SET file_id = 'other'": lambda s: s.jobs.files(),
    "UPDATE blobs SET member = 9": lambda s: by_key(s, 9),
    "UPDATE blobs SET ids = x'01000000'": lambda s: s.scores.load(0),
    "UPDATE blobs SET censored = x'01'": lambda s: by_key(s, 0),
    "UPDATE losses SET loss = x'0000000000000000'": lambda s: s.scores.load_losses(0, 0, "nll"),
    "UPDATE groups SET ids = x'01000000'": lambda s: s.scores.groups(),
    "UPDATE spend SET reserved = 0": lambda s: s.ledger.spent(),
    "UPDATE left_out SET taken_back_at = 'x'": lambda s: s.jobs._db.rows("left_out"),
    "UPDATE meta SET value = '\"x\"' WHERE key = 'run_key'": lambda s: s.run_key,
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_edited_by_hand_is_refused(store: RunStore, edit: str) -> None:
    store.jobs.file_intent(SHA, "n", 3)
    store.jobs.intent("k", 0, 1, "{}")
    put(store, 0, 0, "f", {"a": TokenScores((-1.0,))})
    put(store, 0, 0, "f", {"a": TokenScores((-1.0,))}, 1)
    store.jobs.checkpoints_found("k", ["m"])
    store.ledger.reserve("k", 1.0, purpose="train")
    store.jobs.leave_out(3, "no")
    row = LossRow(np.array([1.0]), np.ones(1, np.int32), None)
    store.scores.save_losses(store.scores.register({"a": 1}), 0, 0, "nll", row)
    EDITS[edit](store)
    with sqlite3.connect(store.run_dir / "run.sqlite") as other:
        other.execute(edit)
    other.close()
    with pytest.raises(StoreCorruptError):
        EDITS[edit](store)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 20)
    before = path.read_bytes()
    with pytest.raises(StoreCorruptError):
        RunStore.create_or_open(tmp_path, MANIFEST)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST).close()
    with sqlite3.connect(tmp_path / "run.sqlite") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(StoreError, match="newer version"):
        RunStore.open(tmp_path)


def test_a_full_disk_is_said_and_costs_nothing_that_was_stored(store: RunStore) -> None:
    put(store, 0, 0, "f", {"a": TokenScores((-1.0,))})
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (pages,) = store._db.execute("PRAGMA page_count")[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match=r"full.*Check free space") as caught:
        put(store, 1, 0, "f", {f"k{i}": TokenScores((-1.0,) * 100) for i in range(100)})
    assert not isinstance(caught.value, StoreCorruptError)
    assert by_key(store, 1).keys() == set()
    store._db.execute("PRAGMA max_page_count = 1000000")
    put(store, 1, 0, "f", {"a": TokenScores((-1.0,))})
    assert by_key(store, 1).keys() == {"a"}


def test_the_ledger_counts_reservations_until_they_are_settled(store: RunStore) -> None:
    store.ledger.reserve("a", 0.6, purpose="train", cap=1.0)
    store.ledger.reserve("a", 0.6, purpose="train", cap=1.0)
    assert store.ledger.spent() == 0.6
    with pytest.raises(BudgetError, match=r"b needs \$0\.41, .*\$0\.60 of the \$1\.00"):
        store.ledger.reserve("b", 0.41, purpose="train", cap=1.0)
    store.ledger.reserve("b", 0.4, purpose="train", cap=1.0)
    assert store.ledger.spent() == 1.0
    store.ledger.settle("a", 0.25)
    store.ledger.settle("b", 0.0)
    assert store.ledger.spent() == 0.25
    assert store.ledger.unsettled() == {}


def test_a_settled_subject_can_be_opened_again_on_top(store: RunStore) -> None:
    store.ledger.reserve("a", 0.5, purpose="train", cap=1.0)
    store.ledger.settle("a", 0.3)
    with pytest.raises(BudgetError):
        store.ledger.reserve("a", 0.8, purpose="train", cap=1.0)
    store.ledger.reserve("a", 0.7, purpose="train", cap=1.0)
    assert store.ledger.spent() == 1.0
    assert store.ledger.unsettled() == {"a": 1.0}


@pytest.mark.parametrize("usd", [-1.0, float("nan"), float("inf")])
def test_an_impossible_amount_is_a_mistake_of_the_caller(store: RunStore, usd: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        store.ledger.reserve("a", usd, purpose="train")


def test_many_small_sums_are_exact(store: RunStore) -> None:
    for i in range(10):
        store.ledger.reserve(f"s{i}", 0.1, purpose="train", cap=1.0)
    assert store.ledger.spent() == 1.0


def test_a_key_that_came_with_a_later_version_does_not_lock_an_older_run_out(tmp_path: Path) -> None:
    config = RunConfig.from_mapping({"data": {"train": "a", "test": "b"}}).model_dump(mode="json")
    older = {"config": {**config, "training": {k: v for k, v in config["training"].items() if k != "max_attempts"}}}
    older["config"]["backend"] = {k: v for k, v in config["backend"].items() if k != "kind"}
    RunStore.create_or_open(tmp_path, older).close()
    with RunStore.create_or_open(tmp_path, {"config": config}):
        pass
    other = {"config": {**config, "backend": {**config["backend"], "kind": "local"}}}
    RunStore.create_or_open(tmp_path / "other", older).close()
    with pytest.raises(RunChangedError, match=r"backend\.kind: embedded -> local"):
        RunStore.create_or_open(tmp_path / "other", other)


def test_what_is_put_on_the_scoring_server_is_known_until_it_is_taken_off(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.hosted.models() == []
        for model in ("ft:a", "ft:b", "ft:a"):
            store.hosted.load_intent(model)
        store.hosted.unloaded("ft:unknown")
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.hosted.models() == ["ft:a", "ft:b"]
        store.hosted.unloaded("ft:a")
        changes = [(t.subject, t.after) for t in store.transitions() if t.subject.startswith("hosted")]
    assert changes == [("hosted ft:a", "intent"), ("hosted ft:b", "intent"), ("hosted ft:a", "unloaded")]
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.hosted.models() == ["ft:b"]


# -- what a program asks is a column ------------------------------------------------------------------------------


def test_a_member_is_left_out_until_it_is_tried_again_or_has_a_model(store: RunStore) -> None:
    store.jobs.leave_out(0, "refused")
    store.jobs.leave_out(1, "refused, too")
    store.jobs.leave_out(0, "refused again")
    assert store.jobs.left_out() == {0: "refused again", 1: "refused, too"}
    store.jobs.intent("k0", 0, 2, "{}")
    assert set(store.jobs.left_out()) == {1}
    store.jobs.leave_out(0, "a third time")
    store.jobs.state("k0", JobStatus.SUCCEEDED, "ft:0")
    assert set(store.jobs.left_out()) == {1}


def test_a_stop_holds_until_it_is_cleared(store: RunStore) -> None:
    assert store.history.stop() is None
    store.history.stopped("parked", "the limit of the day")
    store.history.stopped("interrupted", "by the user")
    stop = store.history.stop()
    assert stop is not None
    assert (stop.kind, stop.reason) == ("interrupted", "by the user")
    store.history.cleared()
    assert store.history.stop() is None


def test_a_state_that_was_known_is_not_written_again(store: RunStore) -> None:
    store.jobs.intent("k", 0, 1, "{}")
    store.jobs.submitted("k", "job-1")
    store.jobs.state("k", JobStatus.RUNNING)
    before = store.sequence, (store.run_dir / "sequence").read_text()
    for _ in range(3):  # a poll that sees nothing new
        store.jobs.state("k", JobStatus.RUNNING)
    assert (store.sequence, (store.run_dir / "sequence").read_text()) == before
    store.jobs.state("k", JobStatus.SUCCEEDED, "ft")
    assert store.sequence > before[0]


def test_busy_time_is_that_of_processes_and_elapsed_time_ends_with_the_last_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]

    def now() -> datetime:
        return fixed_time() + timedelta(seconds=seconds[0])

    monkeypatch.setattr("daunce_api.store.part.utc_now", now)
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        seconds[0] = 10
        with store.history.busy():
            store.jobs.intent("k", 0, 1, "{}")
            store.jobs.submitted("k", "job-1")
            seconds[0] = 40
            store.jobs.state("k", JobStatus.SUCCEEDED, "ft")
            seconds[0] = 50
        seconds[0] = 1000
        with store.history.busy():
            seconds[0] = 1010
            put(store, 0, 0, "f", {"a": TokenScores((-1.0,))})
            seconds[0] = 1020
            # Killed here: nothing after the last thing that was stored counts.
            reader = RunStore.open(tmp_path, read_only=True)
            killed = reader.history.times()
            reader.close()
        seconds[0] = 2_592_000
        store.note("config", "another estimator")
        times = store.history.times()
    assert (killed.busy_seconds, killed.seconds) == (50, 1010)
    assert (times.busy_seconds, times.seconds, times.job_seconds) == (60, 1010, 30)


def test_spending_is_known_by_purpose(store: RunStore) -> None:
    store.ledger.reserve("k-m0-a1", 0.5, purpose="train", cap=1.0)
    store.ledger.reserve("scoring of member 0", 0.25, purpose="score", cap=1.0)
    store.ledger.settle("k-m0-a1", 0.4)
    assert store.ledger.spent_by_purpose() == {"score": 0.25, "train": 0.4}
    assert store.ledger.spent_by_purpose()["train"] == 0.4
    assert store.ledger.unsettled()["scoring of member 0"] == 0.25


# -- what the store notices ---------------------------------------------------------------------------------------


def killed_copy(store: RunStore, folder: Path) -> Path:
    """The run folder as a kill leaves it now: file and write-ahead log."""
    shutil.copytree(store.run_dir, folder)
    return folder


@pytest.mark.parametrize("damage", ["wal removed", "wal cut", "emptied", "file removed", "older copy"])
def test_a_store_that_lost_its_end_is_refused(store: RunStore, tmp_path: Path, damage: str) -> None:
    for n in range(3):
        put(store, n, 0, "f", {"a": TokenScores((-1.0,))})
    store._db.checkpoint()
    older = killed_copy(store, tmp_path / "older")
    for n in range(3, 6):
        put(store, n, 0, "f", {"a": TokenScores((-1.0,))})
    folder = killed_copy(store, tmp_path / "copy")
    file, wal = folder / "run.sqlite", folder / "run.sqlite-wal"
    with RunStore.open(killed_copy(store, tmp_path / "whole")) as whole:
        assert len(whole.scores.models()) == 6
    if damage == "wal removed":
        wal.unlink()
    elif damage == "wal cut":
        wal.write_bytes(wal.read_bytes()[:5000])
    elif damage == "emptied":
        file.write_bytes(b"")
        wal.unlink()
    elif damage == "file removed":
        file.unlink()
        wal.unlink()
    else:
        for name in ("run.sqlite", "run.sqlite-wal"):
            shutil.copy(older / name, folder / name)
    (folder / "run.sqlite-shm").unlink(missing_ok=True)
    with pytest.raises(StoreCorruptError, match=r"has lost what was stored last.*nothing was sent"):
        RunStore.create_or_open(folder, MANIFEST)


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_goes_away_while_the_run_works_takes_nothing_more(
    store: RunStore, tmp_path: Path, how: str
) -> None:
    store.jobs.intent("k", 0, 1, "{}")
    if how == "deleted":
        shutil.rmtree(store.run_dir)
    else:
        store.run_dir.rename(tmp_path / "elsewhere")
    if how == "replaced":
        RunStore.create_or_open(store.run_dir, MANIFEST).close()
    with pytest.raises(StoreError, match="deleted or moved while the run was using it"):
        store.jobs.intent("k2", 1, 1, "{}")


def test_suspect_scores_are_set_aside_and_can_be_taken_back(store: RunStore) -> None:
    first, later = {"a": TokenScores((-1.0,))}, {"a": TokenScores((-2.0,))}
    for member in range(3):
        put(store, member, 0, "f", first)
    store.scores.set_aside([0, 1], "all alike", suspect=True)
    assert [by_key(store, m) for m in range(3)] == [{}, {}, first]
    assert not store.scores.has_all(store.scores.register({"a": 1}), 0)
    assert store.scores.take_back() == (0, 1)
    assert [by_key(store, m) for m in range(3)] == [first] * 3
    assert store.scores.take_back() == ()
    store.scores.set_aside([2], "trained anew", suspect=False)
    assert store.scores.take_back() == (), "they are of a model that was replaced"
    assert by_key(store, 2) == {}
    store.scores.set_aside([0], "alike", suspect=True)
    put(store, 0, 0, "f", later)
    assert by_key(store, 0) == later
    with pytest.raises(StoreError, match="members 0 were scored again since"):
        store.scores.take_back()
    assert by_key(store, 0) == later


def test_each_batch_of_examples_is_a_matrix_of_its_own(store: RunStore) -> None:
    first = store.scores.register({"a": 1, "b": 1, "c": 1})
    more = store.scores.register({"d": 1})
    row = LossRow(np.array([1.0, 2.0, 3.0]), np.ones(3, np.int32), np.array([False, True, False]))
    for member in range(2):
        put(store, member, 0, "f", {key: TokenScores((-1.0,)) for key in "abc"})
        store.scores.save_losses(first, member, 0, "nll", row)
    assert store.scores.complete(first) == {(0, 0), (1, 0)}
    both = np.concatenate([first, more])
    assert store.scores.complete(both) == set()
    put(store, 1, 0, "f", {"d": TokenScores((-1.0,))})
    assert store.scores.complete(both) == {(1, 0)}  # from the measurements, before it has a row
    store.scores.save_losses(more, 1, 0, "nll", LossRow(np.array([4.0]), np.ones(1, np.int32), None))
    assert [g.tolist() for g in store.scores.groups().values()] == [[0, 1, 2], [3]]
    loaded = store.scores.load_losses(1, 0, "nll")
    assert (loaded[0].loss.tolist(), loaded[1].loss.tolist()) == ([1.0, 2.0, 3.0], [4.0])
    assert loaded[0].censored is not None
    assert loaded[0].censored.tolist() == [False, True, False]
    assert loaded[1].censored is None
    assert store.scores.load_losses(1, 0, "margin") == {}
    store.scores.set_aside([1], "trained anew", suspect=False)
    assert store.scores.complete(first) == {(0, 0)}


def test_only_blobs_that_hold_an_example_are_read(store: RunStore) -> None:
    for start in range(0, 30, 10):
        put(store, 0, 0, "f", {f"k{i}": TokenScores((-1.0 - i,) * 2) for i in range(start, start + 10)})
    store._db.execute("UPDATE blobs SET logprobs = x'00' WHERE id = 1")
    some = store.scores.load_some(np.array([25, 12, 25, -1, 99], np.int32), 0)
    assert {i: s.logprobs for i, s in some.scores().items()} == {12: (-13.0,) * 2, 25: (-26.0,) * 2}
    with pytest.raises(StoreCorruptError):
        store.scores.load(0)
