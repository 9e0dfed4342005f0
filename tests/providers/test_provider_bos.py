"""Text servers and models that begin every text with a BOS token: one of it is measured, whoever writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import Server, body_of, run_config, sequence
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import EncodedExample, LocalTokenizer, encode_example
from daunce_api.errors import ContractError
from daunce_api.providers.together import scorer as together_scorer
from tests.data.tokenizer_folders import byte_level, llama_like, write_folder

BOS = 1


def llama_3_like(folder: Path) -> Path:
    """Byte-level BPE with a BOS that the tokenizer adds, and a template that writes it."""
    tokenizer = byte_level(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    return write_folder(folder, tokenizer, template=template, bos_token="<s>", eos_token="</s>")


MAKERS = {"llama": llama_like, "llama 3": llama_3_like}


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path / "model")


def examples(folder: Path) -> list[EncodedExample]:
    """Llama 2's kind reads a text behind a written BOS otherwise than at its start, but for one that begins with a
    space; chats of the other kind begin with a letter."""
    given = [Example("p", prompt=" the sum", completion=" of two")]
    if (folder / "chat_template.jinja").exists():
        given.append(Example("c", messages=(Message("user", "the sum"), Message("assistant", "of two"))))
    return [encode_example(e, LocalTokenizer(folder)) for e in given]


class TextServer:
    """Together's answers, by a tokenizer that puts BOS in front (``adds``) or does not."""

    def __init__(self, folder: Path, *, adds: bool) -> None:
        self.tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.adds = adds
        self.texts: list[str] = []
        self.read: list[list[int]] = []

    def __call__(self, request: httpx2.Request) -> Any:
        body = body_of(request)
        text = body["prompt"]
        ids = self.tokenizer.encode(text, add_special_tokens=self.adds).ids
        self.texts.append(text)
        self.read.append(ids)
        values = sequence("ft", [i % 40 for i in ids])
        found = {"token_logprobs": values, "token_ids": [float(i) for i in ids]}
        choice = {"index": 0, "text": "x", "logprobs": {"token_logprobs": [-0.1], "tokens": ["x"]}}
        answer = {"model": body["model"], "choices": [choice], "prompt": [{"text": text, "logprobs": found}]}
        return httpx2.Response(200, content=json.dumps(answer))


def make(server: Callable[[httpx2.Request], Any], folder: Path, **options: Any) -> Any:
    config = run_config("together", model=str(folder), options=options)
    return together_scorer.open_scorer(Server(server).context(config))


def truth(example: EncodedExample) -> tuple[float, ...]:
    values = sequence("ft", [i % 40 for i in example.ids])
    return tuple(float(values[t] or 0.0) for t in example.targets)


@pytest.mark.parametrize("adds", [True, False])
async def test_one_bos_is_read_whoever_writes_it(adds: bool, folder: Path) -> None:
    server = TextServer(folder, adds=adds)
    scorer = make(server, folder)
    batch = examples(folder)
    assert all(e.ids[0] == BOS != e.ids[1] for e in batch)
    for _ in range(2):
        scores = await scorer.score("ft", batch)
        assert [s.logprobs for s in scores] == [truth(e) for e in batch]
    doubled = [ids for ids in server.read if ids[:2] == [BOS, BOS]]
    assert len(doubled) == (1 if adds else 0), "learned from the first answer"
    assert all(text.startswith("<s>") is not adds for text in server.texts[1:])


async def test_a_bos_that_the_example_has_not_is_explained(tmp_path: Path) -> None:
    """The tokenizer here adds none, the server's does."""
    folder = llama_3_like(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "bos_token": "<s>"}))
    (example,) = [encode_example(Example("p", prompt="the sum", completion=" of two"), LocalTokenizer(folder))]
    assert BOS not in example.ids
    with pytest.raises(ContractError, match=r"id 1\) in front, and the example has none.*own folder.*adds none"):
        await make(TextServer(folder, adds=True), folder).score("ft", [example])


async def test_a_text_that_reads_otherwise_without_its_bos_is_refused(tmp_path: Path) -> None:
    """Llama 2's kind puts a space in front of a text's first word, but not behind a BOS that is part of the text."""
    folder = llama_like(tmp_path / "model")
    example = encode_example(Example("p", prompt="the sum", completion=" of two"), LocalTokenizer(folder))
    with pytest.raises(ContractError, match=r"behind it in another way.*takes token ids"):
        await make(TextServer(folder, adds=True), folder).score("ft", [example])
    assert await make(TextServer(folder, adds=False), folder).score("ft", [example])
