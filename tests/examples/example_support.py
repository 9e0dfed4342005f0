"""Running examples as their pages say to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
USES = ROOT / "examples" / "uses"
DEMO = USES / "backdoor"
DAUNCE = ("-c", "from daunce_api.cli import main; main()")


def run_python(*arguments: str | Path, cwd: Path, timeout: float = 280) -> str:
    """Standard output of ``python ARGUMENTS`` on one thread; fails the test with its error output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def first_of_each_source(name: str, count: int, folder: Path) -> Path:
    """A data file of the demo with the first ``count`` examples of each source."""
    seen: Counter[str] = Counter()
    kept = []
    for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
        source = json.loads(line)["source"]
        seen[source] += 1
        if seen[source] <= count:
            kept.append(line)
    path = folder / name
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path
