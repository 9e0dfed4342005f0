"""Methods of a few lines: gradient products, similarities, text search, chance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from daunce_api.attribution.similarity import bm25_scores, embedding_scores, random_scores
from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.subjects import Subject

GRADIENTS = "weights, gradients"


def example_gradients(subject: Subject, x: Tensor, y: Tensor, batch: int = 100) -> Tensor:
    """(B, P) gradient of every example's loss with respect to all trained parameters."""
    parameters = {n: p.detach() for n, p in subject.model.named_parameters()}

    def loss(weights: dict[str, Tensor], one_x: Tensor, one_y: Tensor) -> Tensor:
        return subject.losses(functional_call(subject.model, weights, (one_x[None],)), one_y[None])[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    parts = []
    for first in range(0, len(x), batch):
        found = each(parameters, x[first : first + batch], y[first : first + batch])
        parts.append(torch.cat([g.flatten(1) for g in found.values()], dim=1))
    return torch.cat(parts)


def gradient_product(subject: Subject, cosine: bool) -> Result:
    """<g_i, g_j>, or the cosine: one step's change of the test loss to first order."""
    train, test = (example_gradients(subject, *side) for side in (subject.train, subject.test))
    if cosine:
        train, test = torch.nn.functional.normalize(train), torch.nn.functional.normalize(test)
    return Result([(train @ test.T).numpy()])


def pixel_similarity(subject: Subject) -> Result:
    """Cosine of raw pixels."""
    train, test = (torch.nn.functional.normalize(side[0].flatten(1)) for side in (subject.train, subject.test))
    return Result([(train @ test.T).numpy()])


def hidden_similarity(subject: Subject) -> Result:
    """Cosine of what the last linear layer is given, under the target."""
    last = [m for m in subject.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    sides = []
    with torch.no_grad():
        for x, _ in (subject.train, subject.test):
            subject.model(x)
            sides.append(torch.nn.functional.normalize(seen.pop()))
    handle.remove()
    return Result([(sides[0] @ sides[1].T).numpy()])


def text_scores(subject: Subject, method: str) -> Result:
    """BM25 or sentence embeddings of prompt and answer."""
    if subject.texts is None:
        raise ValueError("needs text")
    train, test = subject.texts
    return Result([bm25_scores(train, test) if method == "bm25" else embedding_scores(train, test)])


def chance(subject: Subject) -> Result:
    """Uniform random numbers, ten times."""
    size = len(subject.train[0]), len(subject.test[0])
    return Result([np.asarray(random_scores(*size, seed=seed)) for seed in range(10)])


def _no_text(task: str) -> str:
    return "" if task == "lm" else "needs text"


def _no_image(task: str) -> str:
    return "needs images" if task == "lm" else ""


METHODS = (
    Method("gradient dot", GRADIENTS, gradient_product, {"cosine": False}),
    Method("gradient cosine", GRADIENTS, gradient_product, {"cosine": True}),
    Method("BM25", "text", text_scores, {"method": "bm25"}, refuses=_no_text),
    Method("embeddings, all-MiniLM-L6-v2", "text", text_scores, {"method": "embeddings"}, refuses=_no_text),
    Method("similarity of raw pixels", "images", pixel_similarity, refuses=_no_image),
    Method("similarity of the last hidden layer", "weights", hidden_similarity, refuses=_no_image),
    Method("random", "nothing", chance),
)
