"""The long forms: ``python -m tests.reliability.storm --kills 300 --server-kills 20 --load-seconds 600``."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Run what was asked for; ends with status 1 at the first broken promise."""
    from .crashes import crash_storm
    from .faults import fault_run, good_weather, mixed
    from .load import load_alone

    parser = argparse.ArgumentParser(description="Storms of crashes, faults and load against a real server.")
    parser.add_argument("--kills", type=int, default=0, help="times that the client is killed")
    parser.add_argument("--server-kills", type=int, default=0, help="times that the server is killed")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further run is killed after these")
    parser.add_argument("--load-seconds", type=float, default=0, help="time under 64 connections")
    parser.add_argument("--fault-runs", type=int, default=0, help="runs in which 30 %% of the requests fail")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    def tell(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="daunce-storm-") as folder:
        if given.kills or given.server_kills:
            tally = crash_storm(
                Path(folder),
                kills=given.kills,
                server_kills=given.server_kills,
                seed=given.seed,
                seconds=given.seconds,
                tell=tell,
            )
            tell(tally.text())
        if given.fault_runs:
            good = good_weather(Path(folder) / "good")
            for seed in range(given.seed, given.seed + given.fault_runs):
                tell(fault_run(Path(folder) / f"faults-{seed}", mixed(0.3, seed), *good).text())
        if given.load_seconds:
            tell(load_alone(Path(folder) / "load", given.load_seconds).text())


if __name__ == "__main__":
    main()
