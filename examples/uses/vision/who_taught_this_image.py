"""Which training images made the model see this one as it does? Proponents and opponents of test images, as a picture.

    apt-get install dataset-fashion-mnist
    pip install 'daunce-api[local]' scikit-learn
    python who_taught_this_image.py --picture picture.png

Fashion-MNIST, 2,000 training images. The target model, a multilayer perceptron, trains on all of them; every member
starts there and takes one more epoch on a random 30 %. Where the Debian package is not installed (``--data`` names its
folder), 8x8 digits take its place. In the picture every row is
one test image, its proponents (they lowered its loss) and, after a gap, its opponents. Also printed: how often a top-10
proponent has the test image's class, beside nearest neighbours in pixel space, which need no model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from daunce_api.core import choose, estimate, member_losses, top
from daunce_api.providers.local.classifier import Classifier, ClassifierSettings

sys.path.insert(0, str(Path(__file__).parents[2]))
from vision_models import MLP

TRAIN, TEST, CLASSES = 2000, 200, 10
TARGET = ClassifierSettings(n_epochs=8, batch_size=50, learning_rate=0.1, momentum=0.9, schedule="cosine")
MEMBER = ClassifierSettings(n_epochs=1, batch_size=50, learning_rate=0.1, schedule="cosine")
RATIO = 0.3
FASHION = Path("/usr/share/datasets/fashion-mnist")
Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def read_images(folder: Path, seed: int = 0) -> tuple[str, Images, Labels, Images, Labels]:
    """Name, training and test images (pixels 0 to 1, squares) with their classes; a test image was never trained on."""
    if (folder / "train-images-idx3-ubyte.gz").exists():
        x, y, u, v = (
            np.frombuffer(gzip.decompress((folder / f"{part}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
            for part, offset in (
                ("train-images-idx3", 16),
                ("train-labels-idx1", 8),
                ("t10k-images-idx3", 16),
                ("t10k-labels-idx1", 8),
            )
        )
        rng = np.random.default_rng(seed)
        a, b = rng.permutation(len(y))[:TRAIN], rng.permutation(len(v))[:TEST]
        images = [(p.reshape(-1, 28, 28)[rows] / 255).astype(np.float32) for p, rows in ((x, a), (u, b))]
        return "Fashion-MNIST", images[0], y[a].astype(np.int64), images[1], v[b].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    pixels, classes = (digits.images[order] / 16).astype(np.float32), digits.target[order].astype(np.int64)
    return "digits", pixels[:-TEST], classes[:-TEST], pixels[-TEST:], classes[-TEST:]


def write_png(path: Path, picture_HW: NDArray[np.uint8]) -> None:
    """An 8-bit grey picture as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = picture_HW.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture_HW)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def draw(rows: list[list[Images]], side: int = 56, gap: int = 4, wide: int = 24) -> NDArray[np.uint8]:
    """One row a test image; each row is a list of blocks of images, with a wide gap between blocks."""
    height = len(rows) * (side + gap) - gap
    width = sum(len(block) * (side + gap) - gap for block in rows[0]) + wide * (len(rows[0]) - 1)
    out = np.full((height, width), 255, dtype=np.uint8)
    for r, blocks in enumerate(rows):
        left = 0
        for block in blocks:
            for image in block:
                grown = image.repeat(-(-side // image.shape[0]), axis=0).repeat(-(-side // image.shape[1]), axis=1)
                tile = (255 * (1 - grown[:side, :side])).astype(np.uint8)
                out[r * (side + gap) : r * (side + gap) + side, left : left + side] = tile
                left += side + gap
            left += wide - gap
    return out


def same_class(index_Mk: NDArray[np.int64], train: Labels, test: Labels) -> float:
    """Share of the listed training images that have their test image's class."""
    return float((train[index_Mk] == test[:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=TARGET.n_epochs, help="of the target model")
    parser.add_argument(
        "--from-scratch", action="store_true", help="members with the target's recipe on halves, instead of from it"
    )
    parser.add_argument("--data", type=Path, default=FASHION)
    parser.add_argument("--picture", type=Path, default=Path("picture.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, x, y, test_x, test_y = read_images(args.data)
    n, pixels = len(x), x[0].size
    classifier = Classifier(lambda: MLP(pixels, 64, CLASSES))
    rng = np.random.default_rng(1)
    inclusion_KN = np.zeros((args.members, n), dtype=np.bool_)
    for row in inclusion_KN:
        row[rng.permutation(n)[: round((0.5 if args.from_scratch else RATIO) * n)]] = True
    train, test = ((torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((x, y), (test_x, test_y)))
    whole = np.ones((1, n), dtype=np.bool_)
    recipe = replace(TARGET, n_epochs=args.epochs)
    if args.from_scratch:
        trained = classifier.train(*train, inclusion_KN, range(args.members), recipe)
    else:
        target = classifier.train(*train, whole, [7], recipe).state(0)
        trained = classifier.train(*train, inclusion_KN, range(args.members), MEMBER, start=target)
    train_KN, test_KM = classifier.measure(trained, *train), classifier.measure(trained, *test)

    losses = member_losses(train_KN, test_KM, inclusion_KN)
    choice = choose(losses)
    proponents, opponents = (top(losses, choice, 10, opponents=worst) for worst in (False, True))
    related = top(losses, choose(losses, question="retrieval"), 10)
    flat, test_flat = x.reshape(n, -1), test_x.reshape(len(test_x), -1)
    distance_MN = (test_flat**2).sum(1)[:, None] + (flat**2).sum(1) - 2 * test_flat @ flat.T
    nearest_Mk = np.argsort(distance_MN, axis=1)[:, :10]
    shown = [int(np.flatnonzero(test_y == c)[0]) for c in range(CLASSES)][::2]
    rows = [[test_x[[j]], x[proponents.index_Mk[j, :7]], x[opponents.index_Mk[j, :7]]] for j in shown]
    write_png(args.picture, draw(rows))
    quality = estimate(losses, chosen=choice)
    print(
        json.dumps(
            {
                "data": name,
                "members": args.members,
                "estimator": proponents.estimator,
                "self_lds": [round(v, 3) for v in (quality.value, quality.low, quality.high)],
                "mean test loss": float(test_KM.mean()),
                "class of the test image, top-10 proponents": same_class(proponents.index_Mk, y, test_y),
                "class of the test image, top-10 by question=retrieval": same_class(related.index_Mk, y, test_y),
                "class of the test image, top-10 opponents": same_class(opponents.index_Mk, y, test_y),
                "class of the test image, 10 nearest in pixels": same_class(nearest_Mk, y, test_y),
                "picture": str(args.picture),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
