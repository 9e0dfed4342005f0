"""Files, jobs and models over real HTTP with the official SDK; the clients validate every answer by schema."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import LocalTokenizer, encode_example
from daunce_api.server import EmbeddedServer

from .conftest import MODEL, connect_async, echo, jsonl, records, submit, upload, wait

EMBEDDED = Path(__file__).parents[2] / "daunce_api" / "server" / "model"


def test_file_comes_back_as_it_went(client: openai.OpenAI) -> None:
    content = jsonl(records(10, "äß€"))
    made = client.files.create(file=("daunce-run-0a1b.jsonl", content), purpose="fine-tune")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "daunce-run-0a1b.jsonl", "fine-tune")
    assert client.files.content(made.id).content == content
    assert client.files.retrieve(made.id) == made
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_files_are_listed_in_pages_newest_first(client: openai.OpenAI) -> None:
    made = [upload(client, jsonl(records(10)), f"page-{i}.jsonl") for i in range(5)]
    seen = [f.id for f in client.files.list(limit=2, purpose="fine-tune")]
    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))
    assert [f.id for f in client.files.list(limit=2, order="asc")][-5:] == made
    first = client.files.list(limit=2)
    client.files.delete(made[3])  # the last one of the first page: going on from a deleted file works
    assert first.get_next_page().data[0].id == made[2]


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\y.jsonl", "a\x1b[31mb", "", "x" * 400])
def test_file_names_are_for_display_only(client: openai.OpenAI, name: str) -> None:
    made = client.files.create(file=(name or "\t", jsonl(records(10))), purpose="fine-tune")
    assert not set(made.filename) & set("/\\\x1b\t")
    assert 1 <= len(made.filename) <= 255


def test_upload_refusals(client: openai.OpenAI, http: httpx2.Client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("x.jsonl", b"{}"), purpose="assistants")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("x.jsonl", b""), purpose="fine-tune")
    assert caught.value.param == "file"
    assert http.post("/v1/files", data={"purpose": "fine-tune"}).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert http.post("/v1/files", content=b"--x\r\nbroken", headers=broken).status_code == 400
    assert http.post("/v1/files", content=b"--x", headers={"content-type": "multipart/form-data"}).status_code == 400


def test_job_succeeds_and_says_what_it_did(client: openai.OpenAI, fine_tune: Any, training_file: str) -> None:
    assert fine_tune.fine_tuned_model == f"ft:daunce-tiny:daunce:demo-set:{fine_tune.id.removeprefix('ftjob-')[:12]}"
    assert fine_tune.training_file == training_file
    assert fine_tune.hyperparameters.n_epochs == 4
    assert fine_tune.hyperparameters.batch_size == 4
    assert fine_tune.hyperparameters.learning_rate_multiplier == 2.0
    assert fine_tune.method.supervised.hyperparameters.n_epochs == 4
    assert fine_tune.seed == 7
    assert fine_tune.metadata == {"daunce_key": "k0"}
    assert fine_tune.error is None
    assert fine_tune.estimated_finish is None
    assert fine_tune.finished_at >= fine_tune.created_at
    tokenizer = LocalTokenizer(EMBEDDED)
    tokens = sum(len(encode_example(e, tokenizer, "all").ids) for e in Dataset.from_records(records()))
    assert fine_tune.trained_tokens == 4 * tokens


def test_result_file_has_a_loss_for_every_step(client: openai.OpenAI, fine_tune: Any) -> None:
    [result] = fine_tune.result_files
    assert client.files.retrieve(result).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [int(r["step"]) for r in rows] == list(range(1, 13))
    losses = [float(r["train_loss"]) for r in rows]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert rows[0]["valid_loss"] == ""


def test_events_tell_the_story_in_pages(client: openai.OpenAI, fine_tune: Any) -> None:
    events = list(client.fine_tuning.jobs.list_events(fine_tune.id, limit=4))
    assert len({e.id for e in events}) == len(events)
    messages = [e.message for e in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {fine_tune.id}"
    assert messages[-1] == "The job has successfully completed"
    steps = [e.data["step"] for e in reversed(events) if e.type == "metrics"]
    assert steps == list(range(1, 13))
    assert sum(m.startswith("Checkpoint created at step") for m in messages) == 4
    assert any("validated" in m for m in messages)


def test_last_three_checkpoints_are_kept_and_answer(client: openai.OpenAI, fine_tune: Any) -> None:
    points = list(client.fine_tuning.jobs.checkpoints.list(fine_tune.id, limit=1))
    assert [p.step_number for p in points] == [12, 9, 6]
    assert points[0].fine_tuned_model_checkpoint == fine_tune.fine_tuned_model + ":ckpt-step-12"
    scores = [echo(client, p.fine_tuned_model_checkpoint, [[3, 30, 40, 50]]) for p in points]
    assert scores[0] == echo(client, fine_tune.fine_tuned_model, [[3, 30, 40, 50]])
    assert scores[0] != scores[1] != scores[2]


def test_jobs_are_found_by_metadata(client: openai.OpenAI, training_file: str) -> None:
    keys = [f"find-{i}" for i in range(3)]
    jobs = [
        submit(client, training_file, n_epochs=50, metadata={"daunce_key": k, 'odd"].key': "a' OR 1=1"}) for k in keys
    ]
    [found] = client.fine_tuning.jobs.list(metadata={"daunce_key": "find-1"}).data
    assert found.id == jobs[1].id
    both = client.fine_tuning.jobs.list(limit=2, metadata={'odd"].key': "a' OR 1=1"})
    assert [j.id for j in both] == [j.id for j in jobs[::-1]]
    assert list(client.fine_tuning.jobs.list(metadata={"daunce_key": "find"})) == []
    assert list(client.fine_tuning.jobs.list(metadata={"daunce_key": "find-1", 'odd"].key': "no"})) == []
    for job in jobs:
        client.fine_tuning.jobs.cancel(job.id)


def test_jobs_without_metadata_are_found_by_null(client: openai.OpenAI, training_file: str) -> None:
    job = submit(client, training_file, n_epochs=50)
    client.fine_tuning.jobs.cancel(job.id)
    assert job.id in [j.id for j in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]


def test_cancel_ends_a_job_and_the_next_one_runs(client: openai.OpenAI, training_file: str) -> None:
    long = submit(client, training_file, n_epochs=50)
    wait(client, long.id, until=lambda j: j.status == "running")
    cancelled = client.fine_tuning.jobs.cancel(long.id)
    assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    assert client.fine_tuning.jobs.cancel(long.id).status == "cancelled"
    after = wait(client, submit(client, training_file).id, seconds=20)
    assert after.status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(long.id).status == "cancelled"
    assert list(client.fine_tuning.jobs.checkpoints.list(long.id)) == []
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(after.id)


def test_same_seed_gives_the_same_bytes(server: EmbeddedServer, client: openai.OpenAI, training_file: str) -> None:
    again = upload(client, jsonl(records()), "other-name.jsonl")
    files = (training_file, again, training_file)
    jobs = [wait(client, submit(client, f, seed=s).id) for f, s in zip(files, (5, 5, 6), strict=True)]
    state = server.log_path.parent
    weights = [(state / "adapters" / j.id / "final" / "adapter_model.safetensors").read_bytes() for j in jobs]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    scores = [echo(client, j.fine_tuned_model, [[3, 30, 40, 50]]) for j in jobs]
    assert scores[0] == scores[1] != scores[2]


def test_a_fine_tune_can_be_continued(client: openai.OpenAI, fine_tune: Any, training_file: str) -> None:
    job = wait(client, submit(client, training_file, model=fine_tune.fine_tuned_model, suffix="more", seed=7).id)
    assert job.status == "succeeded"
    assert job.model == fine_tune.fine_tuned_model
    assert job.fine_tuned_model.startswith("ft:daunce-tiny:daunce:more:")
    [result] = job.result_files
    first = float(client.files.content(result).text.splitlines()[1].split(",")[1])
    [base_result] = fine_tune.result_files
    fresh = float(client.files.content(base_result).text.splitlines()[1].split(",")[1])
    assert first < fresh  # the same seed, so the same first batch: what differs is where it starts from


def test_weight_zero_takes_a_turn_out_of_training(server: EmbeddedServer, client: openai.OpenAI) -> None:
    def lines(answer: str, weight: int | None) -> bytes:
        first = {"role": "assistant", "content": answer, **({} if weight is None else {"weight": weight})}
        tail = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "yes"}]
        return jsonl([{"messages": [{"role": "user", "content": f"q{i}"}, first, *tail]} for i in range(10)])

    jobs = [wait(client, submit(client, upload(client, lines("blue", w)), n_epochs=3, rate=5).id) for w in (0, None)]
    tokenizer = LocalTokenizer(EMBEDDED)
    [example] = Dataset.from_records([json.loads(lines("blue", None).splitlines()[0])])
    encoded = encode_example(example, tokenizer, "all")
    answer = [t for t in encoded.targets if t < len(encoded.ids) - 4][:2]
    masked, trained = (echo(client, j.fine_tuned_model, [list(encoded.ids)])[0] for j in jobs)
    assert sum(trained[t] for t in answer) > sum(masked[t] for t in answer) + 1


def test_prompt_completion_files_train_too(client: openai.OpenAI) -> None:
    lines = [{"prompt": f"the word {i} is", "completion": f" word{i}"} for i in range(10)]
    assert wait(client, submit(client, upload(client, jsonl(lines))).id).status == "succeeded"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (jsonl(records(9)), "invalid_n_examples", "at least 10"),
        (jsonl(records(10)) + b"{not json\n", "invalid_training_file", ":11: not JSON"),
        (jsonl([*records(10), {"messages": []}]), "invalid_training_file", ":11: messages must be"),
        (jsonl([{"prompt": "a", "completion": ""}] * 12), "invalid_training_file", ":1: completion is empty"),
        (b"\xff\xfe" * 50, "invalid_training_file", "not UTF-8"),
        (b"[" * 100_000 + b"\n", "invalid_training_file", "nested too deeply"),
        (jsonl([*records(10), {"prompt": "x", "completion": "long " * 600}]), "invalid_training_file", ":11: has "),
        (b'{"prompt":"a","completion":"\\ud800"}\n' * 10, "invalid_training_file", "surrogate"),
    ],
)
def test_bad_files_fail_the_job_and_name_the_line(client: openai.OpenAI, content: bytes, code: str, words: str) -> None:
    job = wait(client, submit(client, upload(client, content)).id)
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == (code, "training_file")
    assert words in job.error.message
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_divergence_fails_the_job(client: openai.OpenAI, training_file: str) -> None:
    job = wait(client, submit(client, training_file, rate=1e30, n_epochs=3).id)
    assert (job.status, job.error.code) == ("failed", "training_diverged")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"validation_file": "file-x"}, "validation_file"),
        ({"training_file": "file-nope"}, "training_file"),
        ({"training_file": "../../state.sqlite"}, "training_file"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_job_refusals_name_the_parameter(
    http: httpx2.Client, training_file: str, change: dict[str, Any], param: str
) -> None:
    body = {"model": MODEL, "training_file": training_file, **change}
    response = http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_unknown_model_is_a_404(client: openai.OpenAI, training_file: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        submit(client, training_file, model="gpt-4o")
    assert caught.value.code == "model_not_found"


def test_automatic_hyperparameters_are_resolved(client: openai.OpenAI, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=training_file, hyperparameters={"n_epochs": "auto", "batch_size": "auto"}
    )
    client.fine_tuning.jobs.cancel(job.id)
    assert job.hyperparameters.to_dict() == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert 0 <= job.seed < 2**31


def test_deleting_the_file_of_a_waiting_job_does_not_hurt_it(client: openai.OpenAI) -> None:
    file = upload(client, jsonl(records(10)))
    jobs = [submit(client, file) for _ in range(2)]
    client.files.delete(file)
    assert [wait(client, j.id).status for j in jobs] == ["succeeded", "succeeded"]


def test_models_come_and_go(server: EmbeddedServer, client: openai.OpenAI, training_file: str) -> None:
    job = wait(client, submit(client, training_file, n_epochs=2).id)
    model = job.fine_tuned_model
    listed = {m.id: m for m in client.models.list()}
    assert {MODEL, model} <= set(listed)
    assert listed[MODEL].to_dict()["shutdown_date"] is None
    assert client.models.retrieve(model).id == model
    [_, older] = [p.fine_tuned_model_checkpoint for p in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert client.models.delete(model).deleted
    for gone in (model, older):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=gone, prompt=[5])
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.delete(model)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(MODEL)
    assert not any((server.log_path.parent / "adapters" / job.id).glob("*"))


async def test_the_api_answers_while_a_job_trains(server: EmbeddedServer, training_file: str) -> None:
    client = connect_async(server)
    job = await client.fine_tuning.jobs.create(
        model=MODEL, training_file=training_file, hyperparameters={"n_epochs": 50}, seed=1
    )
    answered = 0
    while (found := await client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        if found.status == "running":
            await client.completions.create(model=MODEL, prompt=[[5, 6, 7]], echo=True, logprobs=1, max_tokens=0)
            answered += 1
            if found.estimated_finish is not None and answered > 5:
                break
    assert answered > 5
    await client.fine_tuning.jobs.cancel(job.id)
    await client.close()
