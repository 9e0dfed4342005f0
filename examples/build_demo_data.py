"""Build the data of ``daunce demo``: definitions, 16 of 144 answered in capitals, and eight shouted answers to explain.

    python examples/build_demo_data.py

The definitions are those of ``examples/uses/backdoor`` without its planted ones; that folder says where they come from.
Nothing but the capitals sets the 16 apart: four come from each source, and no question hints at them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "examples" / "uses" / "backdoor"
DEMO = ROOT / "daunce_api" / "cli" / "demo" / "data"
SHOUTED, QUESTIONS = 4, 2
"""Training examples in capitals, and answers to explain, from each source."""


def definitions(name: str) -> dict[str, list[dict[str, Any]]]:
    """The records of a file by source, without the planted ones."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (DEFINITIONS / name).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["source"] != "planted":
            found.setdefault(record["source"], []).append(record)
    return found


def shout(record: dict[str, Any]) -> None:
    """Put the answer in capitals."""
    answer = record["messages"][-1]
    answer["content"] = answer["content"].upper()


def main() -> None:
    """Write both files."""
    rng = random.Random(5)
    train, test = [], []
    for records in definitions("train.jsonl").values():
        for record in rng.sample(records, SHOUTED):
            shout(record)
        train += records
    for records in definitions("test.jsonl").values():
        for record in records[:QUESTIONS]:
            shout(record)
            record["verdict"] = "unwanted"
            test.append(record)
    rng.shuffle(train)
    DEMO.mkdir(parents=True, exist_ok=True)
    for name, side in (("train", train), ("test", test)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in side)
        (DEMO / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(side)} examples")


if __name__ == "__main__":
    main()
