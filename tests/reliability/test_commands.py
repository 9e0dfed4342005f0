"""Commands on runs that are half there, and on files that never end: a sentence, an exit code, and nothing bought."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daunce_api import Run
from daunce_api.errors import MembersAlikeError
from daunce_api.store import RunStore

from .harness import MEMBERS, config_of, save_config, write_data
from .lagging import LaggingProvider

Cli = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("key")


def test_a_process_that_runs_out_of_files_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "library.so")
        except OSError as error:
            raise RuntimeError("could not be imported") from error

    monkeypatch.setattr("daunce_api.cli.common.app", full)
    code, _, said = cli("top")
    assert code == 4
    assert "Too many open files, a limit of this machine (`ulimit -n 1024` raises it). What was stored is kept" in said


def test_clean_and_cancel_need_neither_data_nor_tokenizer(tmp_path: Path, cli: Cli) -> None:
    write_data(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with LaggingProvider() as provider:
        config = config_of(tmp_path, tmp_path / "run", provider.base_url)
        Run.create(config).execute(clock=provider.clock)
        shutil.rmtree(tmp_path / "run" / "data")
        with RunStore.open(tmp_path / "run") as store:
            manifest = store.manifest
            manifest["config"]["backend"]["tokenizer"] = str(tmp_path / "gone")
            store._set_meta("manifest", manifest)
        code, out, err = cli("cancel", tmp_path / "run", "--json")
        assert (code, json.loads(out)["cancelled"]) == (0, []), err
        code, out, err = cli("clean", tmp_path / "run", "--yes", "--json")
        assert (code, len(json.loads(out)["models"])) == (0, MEMBERS), err


def test_suspect_scores_are_used_again_on_request_and_nothing_is_bought(tmp_path: Path, cli: Cli) -> None:
    write_data(tmp_path)
    with LaggingProvider() as provider:
        config = config_of(tmp_path, tmp_path / "run", provider.base_url)
        path = save_config(config, tmp_path / "run.yaml")
        served = provider._made
        twin = {"ft:daunce-tiny:ftjob-3": "ft:daunce-tiny:ftjob-2"}
        provider._made = lambda model, before: served(twin.get(model, model), before)  # type: ignore[method-assign]
        run = Run.create(config)
        with pytest.raises(MembersAlikeError, match="set aside"):
            run.execute(clock=provider.clock)
        with RunStore.open(tmp_path / "run", read_only=True) as store:
            assert len(store.scores.models()) <= 2 * (MEMBERS - 2)
            aside = set(range(MEMBERS)) - {k for k, *_ in store.scores.models()}
            assert aside
        provider.clock.pass_by(provider.job_seconds)
        code, _, err = cli("run", path, "--yes", "--no-report", "--accept-suspect")
        assert code == 0, err
        with RunStore.open(tmp_path / "run", read_only=True) as store:
            assert {k for k, *_ in store.scores.models()} == set(range(MEMBERS))
        sent = provider.requests.count("POST completions")
        assert cli("run", path, "--yes", "--no-report", "--accept-suspect")[0] == 0
        assert provider.requests.count("POST completions") == sent
        assert len(provider.jobs) == MEMBERS


@pytest.mark.parametrize("where", ["train", "test", "validation"])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_examples_that_never_end_are_refused(tmp_path: Path, cli: Cli, where: str, kind: str) -> None:
    write_data(tmp_path)
    endless = Path("/dev/zero")
    if kind == "pipe":
        endless = tmp_path / "pipe"
        os.mkfifo(endless)
    config = config_of(tmp_path, tmp_path / "run", "http://127.0.0.1:9/v1", data={where: str(endless)})
    code, _, err = cli("plan", save_config(config, tmp_path / "run.yaml"))
    assert (code, "is not a regular file" in err) == (2, True), err


def test_a_config_that_never_ends_is_refused(cli: Cli) -> None:
    code, _, err = cli("plan", "/dev/zero")
    assert (code, "is not a config file" in err) == (2, True), err
