"""Advice: costs are those of the plan, quality is what the study measured, and what cannot be had is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from test_plan import _bytes_for_tokens, chats, config  # noqa: F401 - a fixture

from daunce_api.cli.common import main
from daunce_api.config import RunConfig
from daunce_api.errors import CapabilityError, ConfigurationError
from daunce_api.plan.advice import Advice, Recipe, _costs, advise
from daunce_api.plan.inputs import RunInputs
from daunce_api.plan.prices import Hosting

RESULTS = Path(__file__).parents[1] / "benchmarks" / "RESULTS-estimators.md"


def inputs(settings: RunConfig | None = None) -> RunInputs:
    return RunInputs(settings or config(), chats(300), chats(8))


def recipe(advice: Advice, name: str) -> Recipe:
    return next(r for r in advice.recipes if r.name == name)


def test_the_table_is_that_of_the_study() -> None:
    table = json.loads((files("daunce_api.plan") / "measured.json").read_text(encoding="utf-8"))
    text = RESULTS.read_text(encoding="utf-8")
    part = text[text.index("## Tables, with earlier checkpoints") : text.index("## Tables, final models alone")]
    rows = []
    for section in part.split("\n### ")[1:]:
        task, kind = section.split()[0].strip(","), section.split()[3].strip(",")
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if task in ("digits", "lm") and re.fullmatch(r"0\.\d+", cells[0]):
                places = (0, 1, 2, 3) if kind == "short" else (0, 1, 3, 4, 6)
                missing = [None] if kind == "short" else []
                rows.append([task, kind, *(float(cells[i]) for i in places), *missing])
    assert table["lds"] == rows
    assert len(rows) == 60 + 24
    planted = table["planted"]
    part = text[text.index("## Planted groups, by where members start") : text.index("## Tables, short members")]
    place = part.split("|").index(f" K = {planted['members']} ")
    found = [
        float(line.split("|")[place].split()[0]) for line in part.splitlines() if f" | {planted['kind']} |" in line
    ]
    assert len(found) == 2
    assert min(found) == planted["average_precision"]


def test_recipes_cost_what_their_runs_would() -> None:
    advice = advise(inputs(), max_usd=2.0)
    assert [r.name for r in advice.recipes] == ["Best", "Cheaper", "Cheapest for one cause", "The paper's"]
    for r in advice.recipes:
        assert 0 < r.usd <= 2.0
        hyper = {"n_epochs": 2 if r.epochs is None else r.epochs}
        shape = {"members": r.members, "subset_ratio": r.ratio, "start_from": r.start, "checkpoints": r.checkpoints}
        settings = config(
            ensemble=shape, training={"hyperparameters": hyper, "target_hyperparameters": {"n_epochs": 2}}
        )
        assert inputs(settings).plan().usd == pytest.approx(r.usd, rel=0.01)
    assert recipe(advice, "Cheaper").usd <= recipe(advice, "Best").usd
    larger = advise(inputs(), max_usd=4.0)
    assert (recipe(larger, "Best").expected or 0) >= (recipe(advice, "Best").expected or 0)


def test_quality_is_what_was_measured() -> None:
    free = config(budget={"price": {"training": 0.0, "input": 0.0, "output": 0.0}})
    advice = advise(inputs(free), max_usd=0.0)
    assert recipe(advice, "The paper's").lds == {"digits": 0.515, "lm": 0.571}
    assert recipe(advice, "The paper's").members == 200
    assert (recipe(advice, "Best").expected or 0) == pytest.approx((0.862 + 0.783) / 2, abs=0.02)
    noisy = advise(inputs(free), max_usd=0.0, noise=0.02)
    assert recipe(noisy, "The paper's").lds == {"digits": 0.495, "lm": 0.491}, "the next larger noise"
    assert "measurements with noise of 0.03 nats" in noisy.text()
    assert "above 0.03 nats was not measured" in advise(inputs(free), max_usd=0.0, noise=0.2).text()


def test_short_members_from_the_base_are_priced_and_say_what_they_need() -> None:
    noisy = advise(inputs(), max_usd=0.5, noise=0.03)
    cheap = recipe(noisy, "Best")
    assert (cheap.start, cheap.ratio, cheap.epochs, cheap.checkpoints) == ("base", 0.3, 1, 1)
    assert "start_from: base, subset_ratio: 0.3" in noisy.text()
    assert "epochs of members: 1\n" in noisy.text()
    assert "learning rate of members: the target's times its epochs" in noisy.text()
    settings = config(
        ensemble={"members": cheap.members, "subset_ratio": 0.3},
        training={"hyperparameters": {"n_epochs": 1}, "target_hyperparameters": {"n_epochs": 2}},
    )
    assert inputs(settings).plan().usd == pytest.approx(cheap.usd, rel=0.01)


def test_between_measured_numbers_of_members_the_logarithm_decides() -> None:
    advice = advise(inputs(), max_usd=0.5)
    paper = recipe(advice, "The paper's")
    assert 25 < paper.members < 200
    assert 0.450 <= paper.lds["digits"] <= 0.515
    assert 0.352 <= paper.lds["lm"] <= 0.571


def test_what_a_provider_cannot_do_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from daunce_api.plan import inputs as module

    real = module.capabilities_of

    def capabilities(settings: RunConfig) -> object:
        trainer, scorer = real(settings)
        return replace(trainer, starts_from_fine_tune=False, checkpoints=1), scorer

    monkeypatch.setattr(module, "capabilities_of", capabilities)
    advice = advise(inputs(), max_usd=2.0)
    assert {(r.start, r.checkpoints) for r in advice.recipes} == {("base", 1)}
    assert "start_from: target with checkpoints: 1 is left out. OpenAI cannot fine-tune a fine-tune" in advice.text()


@pytest.mark.parametrize(
    ("max_usd", "noise", "message"),
    [
        (None, None, "needs a budget"),
        (float("nan"), None, "needs a budget"),
        (1.0, -1.0, "standard deviation"),
        (1e-6, None, "too little: the smallest recipe that was measured costs"),
    ],
)
def test_what_cannot_be_advised(max_usd: float | None, noise: float | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        advise(inputs(), max_usd, noise)


def test_reasons_that_hold_for_all_members_are_raised() -> None:
    with pytest.raises(CapabilityError, match="one generated token only"):
        advise(RunInputs(config(), chats(300, "many tokens"), chats(8, "many tokens")), 5.0)
    with pytest.raises(ConfigurationError, match=r"set budget\.price"):
        advise(inputs(config(backend={"model": "gpt-4o-unheard-of"})), 5.0)


@pytest.mark.parametrize(
    ("hosting", "missing"),
    [(Hosting(2.0, None, "one GPU"), "hosting_hours"), (Hosting(None, 3.0, "one GPU"), r"price\.hosting")],
)
def test_what_is_missing_of_an_endpoint_paid_by_the_hour_is_named(hosting: Hosting, missing: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"endpoint that scores is not known: .*set budget\.{missing} to see"):
        _costs(replace(inputs().whole_plan(), hosting=hosting))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 300), ("test", 8)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(e.to_record()) + "\n" for e in chats(count)))
    run = tmp_path / "run.yaml"
    run.write_text(
        "name: a\ndata: {train: train.jsonl, test: test.jsonl}\nbackend: {kind: openai, model: gpt-4.1-mini}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(run), "--advise", "--max-usd", "3", "--noise", "0.01", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipes"][0]["expected_lds"] > found["recipes"][-1]["expected_lds"]
    assert "RESULTS-estimators.md" in found["source"]
