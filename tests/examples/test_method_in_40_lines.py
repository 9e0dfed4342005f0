"""The pedagogical twin says what the library says on the same input."""

from __future__ import annotations

import numpy as np
import pytest

from daunce_api.core import Setting, fit, member_losses
from daunce_api.core.crossval import CrossValidator, column_spearman
from examples.method_in_40_lines import main, scores, self_lds, stderr
from tests.core.problems import linear_problem

P = linear_problem(members=24, train=30, test=7, rank=20)


def test_scores_errors_and_quality_are_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    losses = member_losses(P.train, P.test, P.inclusion)
    library = fit(losses, "whitened", Setting(ridge=1.0))
    np.testing.assert_allclose(scores(P.train, P.test), library.dense(), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(stderr(P.train, P.test), library.stderr_block(), rtol=1e-3)
    cv = CrossValidator(losses)
    predicted = cv.folded([("whitened", Setting(ridge=1.0))])[0]
    expected = column_spearman(predicted, P.test).mean()
    assert self_lds(P.train, P.test, P.inclusion) == pytest.approx(expected, abs=1e-6)
    main()
    assert "self_lds 0." in capsys.readouterr().out
