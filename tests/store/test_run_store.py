"""The run store: what is written is there after a crash, and nothing else is believed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.errors import BudgetError, RunChangedError, RunLockedError, StoreCorruptError, StoreError
from daunce_api.providers.base import JobStatus, TokenScores
from daunce_api.store import FileRow, JobRow, RunStore, Transition

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
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create_or_open(tmp_path / "r", MANIFEST, now=fixed_time) as opened:
        yield opened


def changed(section: str, key: str, value: Any) -> dict[str, Any]:
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in MANIFEST["config"].items()}
    config.setdefault(section, {})[key] = value
    return {**MANIFEST, "config": config}


def test_a_run_is_taken_up_as_it_was_left(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, MANIFEST, run_key="abc") as store:
        store.file_intent(SHA, "daunce.jsonl", 12)
        store.file_uploaded(SHA, "file-1")
        store.job_intent("abc-m0-a1", 0, 1, "{}")
        store.job_submitted("abc-m0-a1", "job-1")
        store.job_state("abc-m0-a1", JobStatus.SUCCEEDED, "ft:m", trained_tokens=7)
        store.job_intent("abc-m-1-a1", -1, 1, "{}")
        store.set_value("probe", {"sigma": 0.01})
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.run_key == "abc"
        assert store.manifest == MANIFEST
        assert store.files() == [FileRow(SHA, "daunce.jsonl", 12, "uploaded", "file-1")]
        assert store.jobs() == [
            JobRow("abc-m-1-a1", -1, 1, "{}", "intent"),
            JobRow("abc-m0-a1", 0, 1, "{}", "succeeded", "job-1", "ft:m", None, 7),
        ]
        assert store.ready_models() == {0: "ft:m"}
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
        ({**MANIFEST, "train_digest": "t2"}, "train_digest: t1 -> t2"),
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
    store.job_intent("k", 0, 1, "{}")
    print("ready", flush=True)
    time.sleep(60)
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
            assert [j.key for j in reader.jobs()] == ["k"]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunStore.create_or_open(tmp_path, {"a": 1}) as store:
        assert store.run_key == "left"
        assert [j.key for j in store.jobs()] == ["k"]


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


def test_a_closed_run_is_one_file_beside_its_lock(tmp_path: Path) -> None:
    RunStore.create_or_open(tmp_path, MANIFEST).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "run.sqlite"]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        RunStore.open(tmp_path, read_only=True)


def test_an_attempt_is_recorded_once(store: RunStore) -> None:
    store.job_intent("k1", 3, 1, "{}")
    with pytest.raises(StoreError, match="attempt 1 of member 3 exists already"):
        store.job_intent("k2", 3, 1, "{}")
    with pytest.raises(StoreError, match="exists already"):
        store.job_intent("k1", 3, 2, "{}")


def test_transitions_tell_what_happened_when(store: RunStore) -> None:
    store.job_intent("k", 0, 1, "{}")
    store.job_submitted("k", "job-1")
    store.job_state("k", JobStatus.RUNNING)
    store.job_state("k", JobStatus.RUNNING)
    store.job_state("k", JobStatus.FAILED, error="bad file")
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
    store.file_intent(SHA, "n", 3)
    store.file_uploaded(SHA, "file-1")
    store.file_intent(SHA, "n", 3)
    assert store.files() == [FileRow(SHA, "n", 3, "uploaded", "file-1")]
    store.file_deleted(SHA)
    store.file_intent(SHA, "n", 3)
    assert store.files() == [FileRow(SHA, "n", 3, "intent", None)]


def test_a_deleted_model_is_not_ready(store: RunStore) -> None:
    store.job_intent("k", 0, 1, "{}")
    store.job_state("k", JobStatus.SUCCEEDED, "m")
    store.model_deleted("k")
    assert store.ready_models() == {}


def test_scores_come_back_bit_for_bit(store: RunStore) -> None:
    scores = {
        "a": TokenScores((-0.1, -1e-300, -17.25)),
        "b": TokenScores((-3.0, -4.0), (False, True)),
        "c": TokenScores((-3.0,), (False,)),
    }
    store.save_scores(4, 0, "echo", scores)
    store.save_scores(4, 1, "echo", {"a": TokenScores((-0.2, 0.0, -1.0))})
    assert store.load_scores(4) == {**scores, "c": TokenScores((-3.0,))}
    assert store.scored_keys(4) == {"a", "b", "c"}
    assert store.scored_keys(4, 1) == {"a"}
    assert store.scored_keys(5) == set()


def test_the_first_measurement_stays(store: RunStore) -> None:
    store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,))})
    store.save_scores(0, 0, "f", {"a": TokenScores((-2.0,)), "b": TokenScores((-3.0,))})
    assert store.load_scores(0) == {"a": TokenScores((-1.0,)), "b": TokenScores((-3.0,))}


def test_a_bad_batch_leaves_nothing(store: RunStore) -> None:
    with pytest.raises(StoreError, match="not finite"):
        store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,)), "b": TokenScores((float("nan"),))})
    assert store.scored_keys(0) == set()


def test_two_scorers_do_not_mix(store: RunStore) -> None:
    store.save_scores(0, 0, "echo", {"a": TokenScores((-1.0,))})
    with pytest.raises(RunChangedError, match="scored with echo, and now with chat"):
        store.save_scores(1, 0, "chat", {"a": TokenScores((-1.0,))})
    assert store.scored_keys(1) == set()


def test_discarding_takes_one_member_with_all_replicates(store: RunStore) -> None:
    for member, replicate in ((0, 0), (0, 1), (1, 0)):
        store.save_scores(member, replicate, "f", {"a": TokenScores((-1.0,))})
    store.discard_scores(0, "model gone")
    assert [store.scored_keys(m, r) for m, r in ((0, 0), (0, 1), (1, 0))] == [set(), set(), {"a"}]


def test_scores_of_checkpoints_are_kept_apart_from_the_final_models(store: RunStore) -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 0, 1)]
    for i, (member, replicate, checkpoint) in enumerate(places):
        store.save_scores(member, replicate, "f", {"a": TokenScores((-float(i),))}, checkpoint)
        store.save_scores(member, replicate, "f", {"a": TokenScores((-9.0,))}, checkpoint)  # the first one stays
    assert [store.load_scores(*p)["a"].logprobs[0] for p in places] == [0.0, -1.0, -2.0, -3.0, -4.0]
    with pytest.raises(RunChangedError):
        store.save_scores(0, 0, "other", {"b": TokenScores((-1.0,))}, 2)
    store.discard_scores(0, "model gone")
    assert [store.scored_keys(*p) for p in places] == [set(), set(), set(), set(), {"a"}]


def trained(store: RunStore, key: str = "k-m0-a1", attempt: int = 1) -> None:
    store.job_intent(key, 0, attempt, "{}")
    store.job_state(key, JobStatus.SUCCEEDED, f"ft:{key}")


def test_checkpoints_are_numbered_from_the_end(store: RunStore) -> None:
    assert store.wanted_checkpoints(0, 3) is None  # no job yet
    assert store.wanted_checkpoints(0, 1) == ()
    trained(store)
    assert store.checkpoints("k-m0-a1") is None
    assert store.wanted_checkpoints(0, 3) is None  # nobody asked the provider yet
    store.checkpoints_found("k-m0-a1", ["step-1", "step-2", "step-3"])
    assert store.wanted_checkpoints(0, 3) == (1, 2)
    assert store.wanted_checkpoints(0, 9) == (1, 2, 3)
    store.checkpoint_gone("k-m0-a1", 1, "404")
    assert store.checkpoints("k-m0-a1") == ("step-1", "step-2", None)
    assert store.wanted_checkpoints(0, 3) == (2,)
    with pytest.raises(StoreError, match="no checkpoint 4"):
        store.checkpoint_gone("k-m0-a1", 4, "404")


def test_a_job_without_checkpoints_is_not_asked_about_again(store: RunStore) -> None:
    trained(store)
    store.checkpoints_found("k-m0-a1", [])
    assert store.checkpoints("k-m0-a1") == ()
    assert store.wanted_checkpoints(0, 3) == ()


def test_nobody_waits_for_checkpoints_of_a_model_that_was_cleaned_up(store: RunStore) -> None:
    trained(store)
    store.model_deleted("k-m0-a1")
    assert store.wanted_checkpoints(0, 3) == ()
    trained(store, "k-m0-a2", 2)
    assert store.wanted_checkpoints(0, 3) is None


def test_a_run_of_an_older_version_is_read_and_taken_up(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,))})
    with sqlite3.connect(tmp_path / "run.sqlite") as other:
        other.executescript("DROP TABLE checkpoints; DROP TABLE checkpoint_scores; PRAGMA user_version = 1")
    other.close()
    before = (tmp_path / "run.sqlite").read_bytes()
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.load_scores(0) == {"a": TokenScores((-1.0,))}
        assert store.scored_keys(0, checkpoint=1) == set()
        assert store.checkpoints("k") is None
    assert (tmp_path / "run.sqlite").read_bytes() == before
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        store.checkpoints_found("k", ["m"])
        store.save_scores(0, 0, "f", {"a": TokenScores((-2.0,))}, 1)
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.load_scores(0) == {"a": TokenScores((-1.0,))}
        assert store.load_scores(0, checkpoint=1) == {"a": TokenScores((-2.0,))}
        assert store.checkpoints("k") == ("m",)


EDITS = {
    "UPDATE checkpoints SET models = '[]'": lambda s: s.checkpoints("k"),
    "UPDATE checkpoint_scores SET checkpoint = 2": lambda s: s.load_scores(0, checkpoint=2),
    "UPDATE checkpoint_scores SET logprobs = x'0000000000000000'": lambda s: s.load_scores(0, checkpoint=1),
    "UPDATE jobs SET model = 'other'": lambda s: s.jobs(),
    "UPDATE files SET file_id = 'other'": lambda s: s.files(),
    "UPDATE scores SET member = 9": lambda s: s.load_scores(9),
    "UPDATE scores SET logprobs = x'0000000000000000'": lambda s: s.load_scores(0),
    "UPDATE scores SET censored = x'01'": lambda s: s.load_scores(0),
    "UPDATE spend SET reserved = 0": lambda s: s.spent(),
    "UPDATE meta SET value = '\"x\"' WHERE key = 'run_key'": lambda s: s.run_key,
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_edited_by_hand_is_refused(store: RunStore, edit: str) -> None:
    store.file_intent(SHA, "n", 3)
    store.job_intent("k", 0, 1, "{}")
    store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,))})
    store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,))}, 1)
    store.checkpoints_found("k", ["m"])
    store.reserve("k", 1.0)
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
    with pytest.raises(StoreCorruptError, match="newer version"):
        RunStore.open(tmp_path)


def test_a_full_disk_is_said_and_costs_nothing_that_was_stored(store: RunStore) -> None:
    store.save_scores(0, 0, "f", {"a": TokenScores((-1.0,))})
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (pages,) = store._db.execute("PRAGMA page_count")[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match=r"full.*Check free space") as caught:
        store.save_scores(1, 0, "f", {f"k{i}": TokenScores((-1.0,) * 100) for i in range(100)})
    assert not isinstance(caught.value, StoreCorruptError)
    assert store.scored_keys(1) == set()
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.save_scores(1, 0, "f", {"a": TokenScores((-1.0,))})
    assert store.scored_keys(1) == {"a"}


def test_the_ledger_counts_reservations_until_they_are_settled(store: RunStore) -> None:
    store.reserve("a", 0.6, cap=1.0)
    store.reserve("a", 0.6, cap=1.0)
    assert store.spent() == 0.6
    with pytest.raises(BudgetError, match=r"b needs \$0\.4100.*\$0\.6000 of the \$1\.00"):
        store.reserve("b", 0.41, cap=1.0)
    store.reserve("b", 0.4, cap=1.0)
    assert store.spent() == 1.0
    store.settle("a", 0.25)
    store.settle("b", 0.0)
    assert store.spent() == 0.25
    assert store.unsettled() == {}


def test_a_settled_subject_can_be_opened_again_on_top(store: RunStore) -> None:
    store.reserve("a", 0.5, cap=1.0)
    store.settle("a", 0.3)
    with pytest.raises(BudgetError):
        store.reserve("a", 0.8, cap=1.0)
    store.reserve("a", 0.7, cap=1.0)
    assert store.spent() == 1.0
    assert store.unsettled() == {"a": 1.0}


@pytest.mark.parametrize("usd", [-1.0, float("nan"), float("inf")])
def test_an_impossible_amount_is_a_mistake_of_the_caller(store: RunStore, usd: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        store.reserve("a", usd)


def test_many_small_sums_are_exact(store: RunStore) -> None:
    for i in range(10):
        store.reserve(f"s{i}", 0.1, cap=1.0)
    assert store.spent() == 1.0


def test_a_key_that_came_with_a_later_version_does_not_lock_an_older_run_out(tmp_path: Path) -> None:
    config = RunConfig.from_mapping({"data": {"train": "a", "test": "b"}}).model_dump(mode="json")
    older = {"config": {**config, "training": {k: v for k, v in config["training"].items() if k != "max_attempts"}}}
    older["config"]["backend"] = {k: v for k, v in config["backend"].items() if k != "kind"}
    RunStore.create_or_open(tmp_path, older).close()
    with RunStore.create_or_open(tmp_path, {"config": config}):
        pass
    other = {"config": {**config, "backend": {**config["backend"], "kind": "local"}}}
    RunStore.create_or_open(tmp_path / "other", older).close()
    with pytest.raises(RunChangedError, match=r"backend\.kind: \(not set\) -> local"):
        RunStore.create_or_open(tmp_path / "other", other)


def test_what_is_put_on_the_scoring_server_is_known_until_it_is_taken_off(tmp_path: Path) -> None:
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.hosted() == []
        for model in ("ft:a", "ft:b", "ft:a"):
            store.load_intent(model)
        store.unloaded("ft:unknown")
    with RunStore.create_or_open(tmp_path, MANIFEST) as store:
        assert store.hosted() == ["ft:a", "ft:b"]
        store.unloaded("ft:a")
        changes = [(t.subject, t.after) for t in store.transitions() if t.subject.startswith("hosted")]
    assert changes == [("hosted ft:a", "intent"), ("hosted ft:b", "intent"), ("hosted ft:a", "unloaded")]
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.hosted() == ["ft:b"]
