"""Writes what the runs beside this file read: ``digits.npz`` with the images, ``train.jsonl`` and ``test.jsonl``.

    pip install 'daunce-api[local]' scikit-learn
    python prepare.py

1,000 training images, every tenth label wrong (``source`` says which), and 100 test images. A record names its image by
the row in ``digits.npz``, and its class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    args = parser.parse_args()
    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))[: args.train + args.test]
    np.savez_compressed(args.folder / "digits.npz", x=(digits.images[order, None] / 16).astype(np.float32))
    labels = digits.target[order].tolist()
    for name, rows in (("train", range(args.train)), ("test", range(args.train, len(order)))):
        lines = []
        for row in rows:
            wrong = name == "train" and row % 10 == 0
            label = (labels[row] + int(rng.integers(1, 10))) % 10 if wrong else labels[row]
            source = "wrong label" if wrong else f"digit {label}"
            lines.append({"id": f"{name}-{row}", "prompt": str(row), "completion": str(label), "source": source})
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
