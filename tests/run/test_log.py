"""The log of a run: what it leaves alone, what it takes out, and that runs do not mix."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from daunce_api._util.log import logger, logging_to


def test_the_hosts_levels_and_handlers_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = logging.getLogger("daunce_api")
    before = (ours.level, ours.handlers[:], ours.propagate)
    with logging_to(tmp_path / "a.log"):
        assert (ours.level, ours.handlers, ours.propagate) == before
        logger.info("a detail")
        logger.warning("a %s with Bearer sk-abcdef1234567890", "warning")
    assert [r.getMessage() for r in caplog.records] == ["a warning with Bearer <secret>"]
    assert caplog.records[0].name == "daunce_api"
    assert caplog.records[0].funcName == "test_the_hosts_levels_and_handlers_are_left_alone"
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO a detail", "WARNING a warning with Bearer <secret>"]


def test_values_of_key_variables_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIN_API_KEY", "correct-horse")
    with logging_to(tmp_path / "a.log"):
        logger.info("100 % of correct-horse")
    assert (tmp_path / "a.log").read_text().endswith("INFO 100 % of <PLAIN_API_KEY>\n")


async def test_two_runs_in_one_process_do_not_mix(tmp_path: Path) -> None:
    async def run(name: str) -> None:
        with logging_to(tmp_path / f"{name}.log"):
            for n in range(3):
                logger.info("%s %d", name, n)
                await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(logger.info, f"{name} in a thread"))

    await asyncio.gather(run("one"), run("two"))
    for name, other in (("one", "two"), ("two", "one")):
        text = (tmp_path / f"{name}.log").read_text()
        assert text.count(name) == 6
        assert other not in text


def test_a_log_that_cannot_be_written_is_only_that(tmp_path: Path) -> None:
    with logging_to(tmp_path / "missing" / "a.log"):
        logger.info("lost")
