"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..data.dataset import message_of
from ..errors import DaunceError
from .api_errors import ApiError, invalid
from .requests import CreateChatCompletion, CreateCompletion, read_body
from .service import ServedModel, Service
from .state import now
from .worker import Read, generate, score

DEFAULT_MAX_TOKENS = 16
PORTION_TOKENS = 2048
MAX_PROMPTS = 2048
MAX_PROMPT_TOKENS = 131_072
"""Of all prompts of one completions request."""


Scored = tuple[int, float, list[tuple[int, float]]]
"""A token, its log-probability, and the most likely tokens in its place with theirs."""


def _rows(ids: Sequence[int], read: Read, top: int) -> list[Scored]:
    tops = zip(read["top_ids"], read["top_logprobs"], strict=True)
    rows = zip(ids, read["logprobs"], tops, strict=True)
    return [(token, logprob, list(zip(*row, strict=True))[:top]) for token, logprob, row in rows]


def _label(service: Service, body: CreateCompletion | CreateChatCompletion) -> Callable[[int], str]:
    """What stands for a token in an answer."""
    return "token_id:{}".format if body.return_tokens_as_token_ids else service.text.label


def _completion_logprobs(service: Service, rows: list[Scored], label: Callable[[int], str]) -> dict[str, Any]:
    """The ``logprobs`` of a completion; each list has one entry a token."""
    alternatives = []
    for token, logprob, row in rows:
        # Two tokens can print alike: the chosen one has the first claim, then the more likely one.
        best: dict[str, float] = {}
        for other, value in row:
            best.setdefault(label(other), value)
        best[label(token)] = logprob
        alternatives.append(best)
    return {
        "tokens": [label(token) for token, _, _ in rows],
        "token_logprobs": [logprob for _, logprob, _ in rows],
        "top_logprobs": alternatives,
        "text_offset": service.text.offsets([token for token, _, _ in rows]),
    }


def _chat_logprobs(service: Service, rows: list[Scored], label: Callable[[int], str]) -> list[dict[str, Any]]:
    """The ``logprobs.content`` of a chat completion."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": label(token), "logprob": logprob, "bytes": list(service.text.token_bytes(token))}

    return [{**entry(token, logprob), "top_logprobs": [entry(*other) for other in row]} for token, logprob, row in rows]


async def complete(service: Service, request: Request) -> Response:
    """Text completion; with ``echo`` and ``max_tokens: 0`` it scores the prompts.

    With ``echo`` every id of the prompt has a log-probability, the first too: that of a text that begins with it,
    given the token that begins or ends texts alone. So the lists are as long as the ids, and hold no null.
    """
    body = await read_body(request, CreateCompletion, _check_ids)
    vllm = service.settings.dialect == "vllm"
    if body.prompt_logprobs is not None and not vllm:
        raise invalid("Unrecognized request argument supplied: prompt_logprobs", param="prompt_logprobs")
    model = service.for_inference(body.model)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = await _prompts(service, body, max_tokens)
    top = body.logprobs or 0
    scores: list[Read] = []
    if (body.echo and body.logprobs is not None) or body.prompt_logprobs is not None:
        scores = await _score(service, model, prompts, max(top, body.prompt_logprobs or 0))
    choices, generated, label = [], 0, _label(service, body)
    for index, ids in enumerate(prompts):
        await asyncio.sleep(0)  # many alternatives can take seconds of this thread: others get their turn
        rows = _rows(ids, scores[index], top) if body.echo and scores else []
        made: list[int] = []
        reason, text = "length", ""
        if max_tokens:
            options = {**body.sampling, "max_tokens": max_tokens, "top": top}
            made, reason, text, read = await _generate(service, model, ids, body.stops, options)
            rows += _rows(made, read, top)
            generated += len(made)
        choice: dict[str, Any] = {
            "index": index,
            "text": (service.text.text(ids) if body.echo else "") + text,
            "logprobs": _completion_logprobs(service, rows, label) if body.logprobs is not None else None,
            "finish_reason": reason,
        }
        if vllm and body.echo and choice["logprobs"] is not None:
            # Nothing stands before the first token; vLLM says so.
            choice["logprobs"]["token_logprobs"][0] = choice["logprobs"]["top_logprobs"][0] = None
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(service, ids, scores[index], body.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": ids, "token_ids": made}
        choices.append(choice)
    return _answer("cmpl", "text_completion", model, choices, sum(map(len, prompts)), generated)


async def chat(service: Service, request: Request) -> Response:
    """Chat completion."""
    body = await read_body(request, CreateChatCompletion)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("Give 'max_completion_tokens' or 'max_tokens', not both.", param="max_tokens")
    model = service.for_inference(body.model)
    ids = _render(service, body)
    wanted = body.max_completion_tokens or body.max_tokens
    _check_length(service, len(ids), wanted or 1, "messages")
    top = body.top_logprobs or 0
    options = {**body.sampling, "max_tokens": wanted or service.base.max_context - len(ids), "top": top}
    made, reason, text, read = await _generate(service, model, ids, body.stops, options)
    content = _chat_logprobs(service, _rows(made, read, top), _label(service, body)) if body.logprobs else None
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
        "logprobs": {"content": content, "refusal": None} if body.logprobs else None,
        "finish_reason": reason,
    }
    extra = {}
    if body.return_token_ids:
        choice["token_ids"], extra["prompt_token_ids"] = made, ids
    return _answer("chatcmpl", "chat.completion", model, [choice], len(ids), len(made), extra)


def _prompt_logprobs(service: Service, ids: list[int], read: Read, top: int) -> list[dict[str, Any] | None]:
    """vLLM's: for each id but the first, the log-probabilities by id of that id and of the ``top`` most likely."""
    entries: list[dict[str, Any] | None] = [None]
    for position, token in enumerate(ids[1:], start=1):
        row = {token: read["logprobs"][position]}
        row |= dict(zip(read["top_ids"][position][:top], read["top_logprobs"][position][:top], strict=True))
        ranks = {i: r for r, i in enumerate(sorted(row, key=lambda i: -row[i]), start=1)}
        label = service.text.label
        entries.append({str(i): {"logprob": v, "rank": ranks[i], "decoded_token": label(i)} for i, v in row.items()})
    return entries


async def _score(service: Service, model: ServedModel, prompts: list[list[int]], top: int) -> list[Read]:
    """Log-probabilities of all prompts, in portions: so requests that arrive meanwhile get their turn."""
    scores: list[Read] = []
    portion: list[list[int]] = []
    for position, ids in enumerate(prompts):
        portion.append(ids)
        if sum(map(len, portion)) >= PORTION_TOKENS or position == len(prompts) - 1:
            scores += await service.infer(model, score, portion, top)
            portion = []
    return scores


def _wrong(why: str) -> ApiError:
    return invalid(f"Invalid value for 'prompt': {why}.", param="prompt", code="invalid_value")


async def _prompts(service: Service, body: CreateCompletion, max_tokens: int) -> list[list[int]]:
    """The ids of all prompts. Raises ApiError 400."""
    vocabulary = service.base.vocabulary
    if not 1 <= len(body.prompts) <= MAX_PROMPTS:
        raise _wrong(f"give 1 to {MAX_PROMPTS} prompts")
    prompts: list[list[int]] = []
    total = 0
    for position, given in enumerate(body.prompts):
        ids = given
        if isinstance(ids, str):
            await asyncio.sleep(0)  # long texts can take seconds of this thread: others get their turn
            ids = _encode(service, ids, "prompt")
        if not ids:
            raise _wrong("a prompt has no tokens")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise _wrong(f"token ids of this model are 0 to {vocabulary - 1}")
        _check_length(service, len(ids), max_tokens, "prompt", f"prompt {position}: " if len(body.prompts) > 1 else "")
        prompts.append(ids)
        total += len(ids)
        _check_total(total)
    return prompts


def _check_ids(raw: dict[str, Any]) -> None:
    """Refuse too many token ids by the lengths of their lists, before each of them is validated."""
    prompt = raw.get("prompt")
    if isinstance(prompt, list):
        _check_total(sum(len(p) if isinstance(p, list) else not isinstance(p, str) for p in prompt))


def _check_total(total: int) -> None:
    if total > MAX_PROMPT_TOKENS:
        raise _wrong(f"the prompts of a request have at most {MAX_PROMPT_TOKENS} tokens")


def _render(service: Service, body: CreateChatCompletion) -> list[int]:
    messages = [message_of(m.as_record()) for m in body.messages]
    try:
        text = service.tokenizer.render(messages, generation_prompt=True, tools=body.tools or ())
    except DaunceError as error:
        raise invalid(f"Invalid value for 'messages': {error}", param="messages") from None
    return _encode(service, text, "messages")


def _encode(service: Service, text: str, param: str) -> list[int]:
    # A token is at least one character, but for texts far beyond the context encoding alone would be work for
    # the sender's gain: no vocabulary packs this many characters into one token on average.
    if len(text) > service.base.max_context * 64:
        raise _too_long(service, f"at least {len(text) // 64}", param)
    try:
        return service.tokenizer.encode(text)
    except DaunceError as error:
        raise invalid(f"Invalid value for '{param}': {error}", param=param) from None


def _check_length(service: Service, prompt: int, completion: int, param: str, place: str = "") -> None:
    total = prompt + completion
    if total > service.base.max_context:
        size = f"{total} tokens ({prompt} in the {param}; {completion} in the completion)"
        raise _too_long(service, size, param, place)


def _too_long(service: Service, size: str, param: str, place: str = "") -> ApiError:
    return invalid(
        f"{place}This model's maximum context length is {service.base.max_context} tokens, however you "
        f"requested {size}. Please reduce the length of the {param} or completion.",
        param=param,
        code="context_length_exceeded",
    )


async def _generate(
    service: Service, model: ServedModel, prompt: list[int], stops: list[str], options: dict[str, Any]
) -> tuple[list[int], str, str, Read]:
    """Generated ids, finish reason, text, and what the model gives for these ids.

    The end token counts as generated and has its log-probability; the text is without it.
    """
    stop_ids = [] if service.base.end is None else [service.base.end]
    ids, read, finished = await service.infer(model, generate, prompt, {**options, "stop_ids": stop_ids})
    text = service.text.text(ids[:-1] if finished else ids)
    found = [at for s in stops if (at := text.find(s)) >= 0]
    if found:
        text = text[: min(found)]
        ids = [i for i, offset in zip(ids, service.text.offsets(ids), strict=True) if offset < len(text)]
        read = {name: values[: len(ids)] for name, values in read.items()}
    return ids, "stop" if found or finished else "length", text, read


def _answer(
    prefix: str,
    kind: str,
    model: ServedModel,
    choices: list[dict[str, Any]],
    prompt_tokens: int,
    completion_tokens: int,
    extra: dict[str, Any] | None = None,
) -> Response:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return JSONResponse(
        {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": now(),
            "model": model.id,
            "system_fingerprint": model.fingerprint,
            "choices": choices,
            "usage": {**usage, "total_tokens": prompt_tokens + completion_tokens},
            **(extra or {}),
        }
    )
