"""Classifiers through run.yaml: the examples as they are, against the Python interface, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from daunce_api import Attribution, Run, RunConfig
from daunce_api.errors import ConfigurationError, DataError, RejectedError, StoreError
from daunce_api.providers.local.classifier import Classifier
from daunce_api.providers.local.options import ClassifierSettings, LocalOptions, options_of, settings_of
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.task import ClassifierTask, Records, TaskSpec, load_task
from daunce_api.providers.local.worker import (
    TrainTask,
    check_task,
    run_score,
    run_train,
)
from daunce_api.providers.objective import Objective
from daunce_api.report.page import write_report

pytest.importorskip("sklearn")
EXAMPLE = Path(__file__).parents[2] / "examples" / "vision_run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder with less data."""
    folder = tmp_path_factory.mktemp("examples") / "vision_run"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("runs", "*.jsonl", "*.npz", "__pycache__"))
    shutil.copy(EXAMPLE.parent / "vision_models.py", folder.parent)
    command = [sys.executable, folder / "prepare.py", "--train", "60", "--test", "8"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def content(folder: Path, tmp_path: Path):
    def make(name: str, **options: Any) -> dict[str, Any]:
        content = yaml.safe_load((folder / f"{name}.yaml").read_text())
        content["run_dir"] = str(tmp_path / "run")
        content["ensemble"]["members"] = 4
        content["backend"]["options"] |= {"engine": "thread", **options}
        content["training"]["hyperparameters"]["n_epochs"] = 2
        return content

    return make


def margins(losses: np.ndarray) -> np.ndarray:
    """log(1 - p) - log p of losses -log p."""
    return losses + np.log(-np.expm1(-losses))


def start(content: dict[str, Any], folder: Path) -> Run:
    return Run.create(RunConfig.from_mapping(content, base=folder))


@pytest.mark.parametrize("objective", ["subset", "influence", "fisher"])
def test_the_perceptron_of_the_examples_from_the_target(content: Any, folder: Path, objective: str):
    run = start(content("mlp", objective=objective), folder)
    assert run.plan().jobs == 5
    attribution = run.execute()
    assert attribution.train_loss_KN.shape == (4, 60)
    assert attribution.test_loss_KM.shape == (4, 8)
    assert (attribution.train_loss_KN.std(axis=0) > 1e-5).all()
    assert attribution.noise == pytest.approx(0.0, abs=1e-12)
    # Steps of members (2 epochs of 18 examples in one batch each) by those of the target (12 epochs of three batches).
    assert attribution.rho == ("base" if objective == "fisher" else pytest.approx(2 / (12 * 3)))
    ensemble = run.material.ensemble
    weights = Objective(objective).weights_KN(ensemble.inclusion_KN, ensemble.seeds_K)  # type: ignore[arg-type]
    if weights is None:
        assert attribution.weight_KN is None
        np.testing.assert_array_equal(attribution.design_KN, attribution.inclusion_KN)
    else:
        np.testing.assert_array_equal(attribution.design_KN, weights)
        by_inclusion = replace(attribution, weight_KN=None).with_estimator("inclusion").scores_NM()
        assert not np.allclose(attribution.with_estimator("inclusion").scores_NM(), by_inclusion)
        loaded = Attribution.load(attribution.save(run.run_dir / "saved"))
        np.testing.assert_array_equal(loaded.weight_KN, weights)
        np.testing.assert_array_equal(attribution.first(3).weight_KN, weights[:3])
    again = Run.open(run.run_dir).attribution()
    np.testing.assert_array_equal(again.train_loss_KN, attribution.train_loss_KN)
    if objective == "subset":
        whole = start(content("mlp") | {"run_dir": str(run.run_dir) + "-alone"}, folder)
        one = content("mlp", members_at_a_time=1) | {"run_dir": str(run.run_dir) + "-one"}
        np.testing.assert_allclose(whole.execute().train_loss_KN, start(one, folder).execute().train_loss_KN, atol=2e-4)


def test_resnet9_of_the_examples_from_scratch_with_margins(content: Any, folder: Path):
    chosen = content("resnet9")
    chosen["training"]["hyperparameters"]["n_epochs"] = 1
    run = start(chosen, folder)
    attribution = run.execute()
    assert attribution.loss == "margin"
    assert attribution.train_loss_KN.shape == (4, 60)
    # The same members by the Python interface.
    models = [p / "model.safetensors" for p in (run.run_dir / "local" / "models").iterdir()]
    task = load_task(TaskSpec("digits_task.py:resnet9", str(folder)))
    classifier = Classifier(task.model_factory)
    x = torch.from_numpy(np.load(folder / "digits.npz")["x"])
    y = torch.tensor([int(e.completion) for e in (*run.train, *run.test)])
    expected = [
        margins(classifier.measure(classifier._stacked([load_file(path)]), x, y)[0]) for path in models
    ]  # in the order of the folder
    got = np.concatenate([attribution.train_loss_KN, attribution.test_loss_KM], axis=1)
    for row in got:
        assert min(np.abs(row - e).max() for e in expected) < 1e-3
    settings = settings_of(chosen["training"]["hyperparameters"], ClassifierSettings)
    seeds = run.material.ensemble.seeds_K.tolist()
    members = classifier.train(x[:60], y[:60], attribution.inclusion_KN, seeds, settings)
    np.testing.assert_allclose(got[:, :60], margins(classifier.measure(members, x[:60], y[:60])), atol=1e-2)


def test_a_report_is_made_without_the_tasks_code(content: Any, folder: Path, tmp_path: Path):
    chosen = content("mlp")
    run = start(chosen, folder)
    run.execute()
    aside = folder / "aside.py"
    (folder / "digits_task.py").rename(aside)
    try:
        write_report(Run.open(run.run_dir).attribution(), tmp_path / "report.html")
        assert (tmp_path / "report.html").stat().st_size > 10_000
    finally:
        aside.rename(folder / "digits_task.py")


def test_changed_inputs_are_another_run(content: Any, folder: Path):
    run = start(content("mlp"), folder)
    run.execute()
    kept = (folder / "digits.npz").read_bytes()
    try:
        np.savez(folder / "digits.npz", x=np.zeros((68, 1, 8, 8), np.float32))
        with pytest.raises(StoreError):
            start(content("mlp"), folder).execute()
    finally:
        (folder / "digits.npz").write_bytes(kept)


def test_a_task_of_ones_own_reads_its_inputs_and_starts_from_weights(tmp_path: Path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from neighbour import WIDTH\n"
        "classes = ['cat', 'dog']\n"
        "def model_factory():\n    return torch.nn.Linear(WIDTH, 2)\n"
        "def read(prompts):\n    return torch.stack([torch.full((WIDTH,), float(len(p))) for p in prompts])\n"
        "def loss(z, y):\n    return torch.nn.functional.cross_entropy(z, y, reduction='none', label_smoothing=0.1)\n"
    )
    weights = {"weight": torch.arange(6.0).reshape(2, 3) / 10, "bias": torch.zeros(2)}
    save_file(weights, tmp_path / "start.safetensors")
    spec = TaskSpec("own.py", str(tmp_path), start=str(tmp_path / "start.safetensors"))
    records = (("a", "cat"), ("bbb", "dog"), ("a", "dog"))
    lines = [f'{{"prompt": "{p}", "completion": "{c}"}}\n'.encode() for p, c in records]
    members = (
        MemberTask("one", lines[0] + lines[1], 1, tmp_path / "one"),
        MemberTask("same", lines[0] * 2, 2, tmp_path / "same"),
    )
    one, same = run_train(TrainTask(spec, ClassifierSettings(batch_size=2), Objective(), members))
    assert one.error is None
    assert one.trained_tokens == 4
    base = run_score(spec, None, records)
    x = torch.tensor([[1.0] * 3, [3.0] * 3, [1.0] * 3]).double()
    expected = (x @ weights["weight"].double().T).log_softmax(1)[range(3), [0, 1, 1]]
    np.testing.assert_allclose(np.array(base)[:, 0], expected, atol=1e-6)
    # One step of each, by hand; the second one has the same record twice.
    for result, rows in ((one, [0, 1]), (same, [0, 0])):
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(weights)
        y = torch.tensor([0, 1, 1])[rows]
        torch.nn.functional.cross_entropy(model(x[rows].float()), y, label_smoothing=0.1).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
            want = model(x.float()).log_softmax(1)[range(3), [0, 1, 1]]
        got = run_score(spec, tmp_path / result.key, records)
        np.testing.assert_allclose(np.array(got)[:, 0], want, atol=1e-5)


def test_what_a_member_learns_does_not_depend_on_its_group(folder: Path, tmp_path: Path):
    spec = TaskSpec("digits_task.py:mlp", str(folder), inputs=str(folder / "digits.npz"))
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    files = [b"".join(lines[k : 40 + k]) for k in (0, 15, 5)]
    tasks = [MemberTask(f"m{k}", content, k, tmp_path / f"m{k}") for k, content in enumerate(files)]
    chosen = ClassifierSettings(n_epochs=2, batch_size=7)
    records = tuple((str(i), "3") for i in range(8))

    def losses(order: list[int]) -> list[Any]:
        members = tuple(tasks[k] for k in order)
        results = run_train(TrainTask(spec, chosen, Objective(), members))
        return [run_score(spec, tmp_path / r.key, records) for r in results]

    together = losses([2, 0, 1])
    for place, k in enumerate([2, 0, 1]):
        np.testing.assert_allclose(together[place], losses([k])[0], atol=1e-4)


def test_records_that_do_not_fit_are_named():
    task = ClassifierTask(lambda: torch.nn.Linear(2, 2), classes=["cat", "dog"], read=lambda p: torch.zeros(len(p), 2))
    with pytest.raises(DataError) as caught:
        Records(task, None).read([("a", "cat"), ("b", "cow"), ("c", "pig")])
    assert "cow" in str(caught.value)
    assert "pig" in str(caught.value)
    with pytest.raises(DataError, match="gave 1 inputs for 2"):
        Records(ClassifierTask(task.model_factory, read=lambda p: torch.zeros(1, 2)), None).read(
            [("a", "0"), ("b", "1")]
        )
    with pytest.raises(ConfigurationError, match="inputs"):
        Records(ClassifierTask(task.model_factory), None)


def test_rows_and_class_numbers_are_checked(folder: Path):
    material = Records(load_task(TaskSpec("digits_task.py:mlp", str(folder))), str(folder / "digits.npz"))
    with pytest.raises(DataError) as caught:
        material.read([("68", "1"), ("-1", "1"), ("0", "seven")])
    assert all(word in str(caught.value) for word in ("'68'", "'-1'", "'seven'"))


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        (None, "task.py:x", "does not exist"),
        ("x = 1", "task.py:y", "AttributeError"),
        ("x = 1", "task.py:x", "no model_factory"),
        ("import nothing_of_this_name", "task.py:x", "ModuleNotFoundError"),
        ("", "no_such_module_here:x", "ModuleNotFoundError"),
    ],
)
def test_tasks_that_cannot_be_used_are_refused(tmp_path: Path, text: str | None, name: str, problem: str):
    if text is not None:
        (tmp_path / "task.py").write_text(text)
    with pytest.raises(ConfigurationError, match=problem):
        load_task(TaskSpec(name, str(tmp_path)))


def test_a_broken_task_ends_the_run_before_anything_is_trained(content: Any, folder: Path):
    chosen = content("mlp", task="digits_task.py:nothing")
    with pytest.raises(RejectedError, match="nothing"):
        start(chosen, folder).execute()


def test_options_that_do_not_fit_a_task_are_refused(content: Any, folder: Path):
    for options, problem in (({"dtype": "bfloat16"}, "language models"), ({"fine_tuning": "full"}, "language models")):
        with pytest.raises(ConfigurationError, match=problem):
            options_of(RunConfig.from_mapping(content("mlp", **options), base=folder))
    named = content("mlp")
    named["backend"]["tokenizer"] = "gpt-4o"
    with pytest.raises(ConfigurationError, match="tokenizer is for language models"):
        options_of(RunConfig.from_mapping(named, base=folder))
    spec = TaskSpec(
        "digits_task.py:mlp", str(folder), inputs=str(folder / "digits.npz"), options=LocalOptions(device="cuda:9")
    )
    with pytest.raises(ConfigurationError, match=r"'cuda:9' is not available; torch has: cpu"):
        check_task(spec)
    with pytest.raises(RejectedError, match="lora_rank"):
        settings_of({"lora_rank": 3}, ClassifierSettings)
    with pytest.raises(RejectedError, match="momentum"):
        settings_of({"momentum": 2}, ClassifierSettings)
