"""Coverage-guided fuzzing of the readers: ``python -m tests.reliability.fuzz -max_total_time=60`` (needs atheris)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Fuzz until a time or a failure; libFuzzer's options are taken from the command line."""
    import atheris

    with atheris.instrument_imports(include=["daunce_api"]):
        from daunce_api.config import RunConfig
        from daunce_api.data.dataset import Dataset
        from daunce_api.errors import DaunceError
        from daunce_api.providers.replay.tape import JsonLines

    from .wire_fuzz import CALLS, STATUSES, answered, as_json, changed

    folder = Path(tempfile.mkdtemp(prefix="daunce-fuzz-"))

    def readers(kind: int, raw: bytes) -> None:
        path = folder / "input"
        path.write_bytes(raw)
        try:
            if kind == 0:
                Dataset.from_jsonl(path)
            elif kind == 1:
                RunConfig.from_yaml(path)
            else:
                JsonLines.deserialize(raw.decode(errors="replace"))
        except DaunceError:
            return

    def one(data: bytes) -> None:
        draw = atheris.FuzzedDataProvider(data)
        what = draw.ConsumeIntInRange(0, 5)
        if what < 3:
            readers(what, draw.ConsumeBytes(4096))
            return
        call, status = draw.ConsumeIntInRange(0, CALLS - 1), draw.PickValueInList(list(STATUSES))
        if what == 3:
            answered(call, status, draw.ConsumeBytes(4096))
            return
        path = [draw.ConsumeIntInRange(0, 11) for _ in range(draw.ConsumeIntInRange(1, 6))]
        template = draw.ConsumeIntInRange(0, 8)
        text = draw.ConsumeUnicode(200)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        answered(call, status, as_json(changed(template, path, value)))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
