"""Record what dattri 0.3.0 says about a fixed problem: ``python make_dattri_lds.py`` with dattri installed.

The problem itself (`problem`) is rebuilt by the test, so only dattri's answers are stored.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, M) scores, (S, N) inclusion and (S, M) losses; ties in one column, one column that is pure noise."""
    rng = np.random.default_rng(20261122)
    score = rng.normal(size=(30, 5))
    inclusion = np.zeros((24, 30), dtype=bool)
    for row in inclusion:
        row[rng.permutation(30)[:15]] = True
    loss = -(inclusion @ score) + rng.normal(size=(24, 5)) * [0.1, 1, 3, 0, 0]
    loss[:, 3] = np.round(loss[:, 3])
    loss[:, 4] = rng.normal(size=24)
    return score, inclusion, loss


def main() -> None:
    """Write dattri_lds.json beside this file."""
    import torch
    from dattri.metric import lds

    score, inclusion, loss = problem()
    indices = torch.tensor(np.nonzero(inclusion)[1].reshape(24, 15))
    values, _ = lds(torch.tensor(score), (torch.tensor(-loss), indices))
    path = Path(__file__).with_name("dattri_lds.json")
    path.write_text(json.dumps({"dattri": "0.3.0", "lds": values.tolist()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
