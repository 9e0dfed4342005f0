"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..data.dataset import message_of
from ..errors import DaunceError
from .api_errors import ApiError, invalid
from .requests import CreateChatCompletion, CreateCompletion, read_body
from .service import ServedModel, Service
from .state import now

DEFAULT_MAX_TOKENS = 16
PORTION_TOKENS = 2048


class _Tokens:
    """Ids with their log-probabilities and most likely alternatives, and the words for them in an answer."""

    def __init__(self, service: Service, as_ids: bool) -> None:
        self._text = service.text
        self._as_ids = as_ids
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []

    def add(self, ids: Sequence[int], answer: dict[str, Any], top: int) -> None:
        self.ids += ids
        self.logprobs += answer["logprobs"]
        if top:
            self.top += [
                list(zip(*row, strict=True)) for row in zip(answer["top_ids"], answer["top_logprobs"], strict=True)
            ]
        else:
            self.top += [[] for _ in ids]

    def label(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._text.label(token)

    def legacy(self) -> dict[str, Any]:
        """The ``logprobs`` of a completion; each list has one entry a token."""
        return {
            "tokens": [self.label(i) for i in self.ids],
            "token_logprobs": self.logprobs,
            "top_logprobs": [self._top_of(*at) for at in zip(self.ids, self.logprobs, self.top, strict=True)],
            "text_offset": self._text.offsets(self.ids),
        }

    def _top_of(self, token: int, logprob: float, row: list[tuple[int, float]]) -> dict[str, float]:
        # Two tokens can print alike: the chosen one has the first claim, then the more likely one.
        best: dict[str, float] = {}
        for other, value in row:
            best.setdefault(self.label(other), value)
        best[self.label(token)] = logprob
        return best

    def chat(self) -> list[dict[str, Any]]:
        """The ``logprobs.content`` of a chat completion."""
        pairs = zip(self.ids, self.logprobs, self.top, strict=True)
        return [{**self._entry(i, lp), "top_logprobs": [self._entry(*t) for t in row]} for i, lp, row in pairs]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.label(token), "logprob": logprob, "bytes": list(self._text.token_bytes(token))}


class CompletionRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: Request) -> Response:
        """Text completion; with ``echo`` and ``max_tokens: 0`` it scores the prompts.

        With ``echo`` every id of the prompt has a log-probability, the first too: that of a text that begins with it,
        given the token that begins or ends texts alone. So the lists are as long as the ids, and hold no null.
        """
        body = await read_body(request, CreateCompletion, self._check_ids)
        if body.prompt_logprobs is not None and not self._vllm:
            raise invalid("Unrecognized request argument supplied: prompt_logprobs", param="prompt_logprobs")
        model = await self._service.for_inference(body.model)
        prompts = self._prompts(body)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        for position, ids in enumerate(prompts):
            self._check_length(len(ids), max_tokens, f"prompt {position}: " if len(prompts) > 1 else "", "prompt")
        top = body.logprobs or 0
        scores: list[dict[str, Any]] = []
        if (body.echo and body.logprobs is not None) or body.prompt_logprobs is not None:
            scores = await self._score(model, prompts, max(top, body.prompt_logprobs or 0))
        choices, generated = [], 0
        for index, ids in enumerate(prompts):
            tokens = _Tokens(self._service, body.return_tokens_as_token_ids)
            if body.echo:
                blank = {"logprobs": [0.0] * len(ids), "top_ids": [[]] * len(ids), "top_logprobs": [[]] * len(ids)}
                tokens.add(ids, scores[index] if scores else blank, top)
            made: list[int] = []
            reason, text = "length", ""
            if max_tokens:
                made, reason, text, answer = await self._generate(
                    model, ids, body.stops, {**body.sampling, "max_tokens": max_tokens, "top": top}
                )
                tokens.add(made, answer, top)
                generated += len(made)
            choice: dict[str, Any] = {
                "index": index,
                "text": (self._service.text.text(ids) if body.echo else "") + text,
                "logprobs": tokens.legacy() if body.logprobs is not None else None,
                "finish_reason": reason,
            }
            if self._vllm and body.echo and choice["logprobs"] is not None:
                # Nothing stands before the first token; vLLM says so.
                choice["logprobs"]["token_logprobs"][0] = choice["logprobs"]["top_logprobs"][0] = None
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self._prompt_logprobs(ids, scores[index], body.prompt_logprobs)
            if body.return_token_ids:
                choice |= {"prompt_token_ids": ids, "token_ids": made}
            choices.append(choice)
        return self._answer("cmpl", "text_completion", model, choices, sum(map(len, prompts)), generated)

    @property
    def _vllm(self) -> bool:
        return self._service.settings.dialect == "vllm"

    def _prompt_logprobs(self, ids: list[int], score: dict[str, Any], top: int) -> list[dict[str, Any] | None]:
        """vLLM's: for each id but the first, the log-probabilities by id of that id and of the ``top`` most likely."""
        entries: list[dict[str, Any] | None] = [None]
        for position, token in enumerate(ids[1:], start=1):
            row = {token: score["logprobs"][position]}
            if top:
                best = zip(score["top_ids"][position][:top], score["top_logprobs"][position][:top], strict=True)
                row |= dict(best)
            ranks = {i: r for r, i in enumerate(sorted(row, key=lambda i: -row[i]), start=1)}
            label = self._service.text.label
            entries.append(
                {str(i): {"logprob": v, "rank": ranks[i], "decoded_token": label(i)} for i, v in row.items()}
            )
        return entries

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, CreateChatCompletion)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise invalid("Give 'max_completion_tokens' or 'max_tokens', not both.", param="max_tokens")
        model = await self._service.for_inference(body.model)
        ids = self._render(body)
        asked = body.max_completion_tokens or body.max_tokens
        self._check_length(len(ids), asked or 1, "", "messages")
        max_tokens = asked or self._service.base.max_context - len(ids)
        top = body.top_logprobs or 0
        made, reason, text, answer = await self._generate(
            model, ids, body.stops, {**body.sampling, "max_tokens": max_tokens, "top": top}
        )
        tokens = _Tokens(self._service, body.return_tokens_as_token_ids)
        tokens.add(made, answer, top)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": {"content": tokens.chat(), "refusal": None} if body.logprobs else None,
            "finish_reason": reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = made
        extra = {"prompt_token_ids": ids} if body.return_token_ids else {}
        return self._answer("chatcmpl", "chat.completion", model, [choice], len(ids), len(made), extra)

    async def _score(self, model: ServedModel, prompts: list[list[int]], top: int) -> list[dict[str, Any]]:
        """Log-probabilities of all prompts, in portions: so requests that arrive meanwhile get their turn."""
        scores: list[dict[str, Any]] = []
        portion: list[list[int]] = []
        for position, ids in enumerate(prompts):
            portion.append(ids)
            if sum(map(len, portion)) >= PORTION_TOKENS or position == len(prompts) - 1:
                message = {"op": "score", "prompts": portion, "top": top}
                scores += (await self._service.infer(model, message))["results"]
                portion = []
        return scores

    def _prompts(self, body: CreateCompletion) -> list[list[int]]:
        limit = self._service.settings.max_prompts
        if not 1 <= len(body.prompts) <= limit:
            raise invalid(
                f"Invalid value for 'prompt': give 1 to {limit} prompts.", param="prompt", code="invalid_value"
            )
        base = self._service.base
        prompts = []
        for prompt in body.prompts:
            ids = self._encode(prompt, "prompt") if isinstance(prompt, str) else prompt
            if not ids:
                raise invalid(
                    "Invalid value for 'prompt': a prompt has no tokens.", param="prompt", code="invalid_value"
                )
            if min(ids) < 0 or max(ids) >= base.vocabulary:
                raise invalid(
                    f"Invalid value for 'prompt': token ids of this model are 0 to {base.vocabulary - 1}.",
                    param="prompt",
                    code="invalid_value",
                )
            prompts.append(ids)
        self._check_total(sum(map(len, prompts)))
        return prompts

    def _check_ids(self, raw: dict[str, Any]) -> None:
        """Refuse too many token ids by the lengths of their lists, before each of them is validated."""
        prompt = raw.get("prompt")
        if isinstance(prompt, list):
            self._check_total(sum(len(p) if isinstance(p, list) else not isinstance(p, str) for p in prompt))

    def _check_total(self, total: int) -> None:
        limit = self._service.settings.max_prompt_tokens
        if total > limit:
            raise invalid(
                f"Invalid value for 'prompt': the prompts have {total} tokens, a request at most {limit}.",
                param="prompt",
                code="invalid_value",
            )

    def _render(self, body: CreateChatCompletion) -> list[int]:
        records = [m.as_record() for m in body.messages]
        try:
            messages = [message_of(record) for record in records]
            text = self._service.tokenizer.render(messages, generation_prompt=True, tools=body.tools or ())
            return self._encode(text, "messages")
        except DaunceError as error:
            raise invalid(f"Invalid value for 'messages': {error}", param="messages") from None

    def _encode(self, text: str, param: str) -> list[int]:
        # A token is at least one character, but for texts far beyond the context encoding alone would be work for
        # the sender's gain: no vocabulary packs this many characters into one token on average.
        if len(text) > self._service.base.max_context * 64:
            raise self._too_long(f"at least {len(text) // 64}", "", param)
        return self._service.tokenizer.encode(text)

    def _check_length(self, prompt: int, completion: int, place: str, param: str) -> None:
        if prompt + completion > self._service.base.max_context:
            raise self._too_long(
                f"{prompt + completion} tokens ({prompt} in the {param}; {completion} in the completion)", place, param
            )

    def _too_long(self, size: str, place: str, param: str) -> ApiError:
        return invalid(
            f"{place}This model's maximum context length is {self._service.base.max_context} tokens, however you "
            f"requested {size}. Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )

    async def _generate(
        self, model: ServedModel, ids: list[int], stops: list[str], options: dict[str, Any]
    ) -> tuple[list[int], str, str, dict[str, Any]]:
        """Generated ids, finish reason, text, and the model's answer cut to these ids.

        The end token counts as generated and has its log-probability; the text is without it.
        """
        base = self._service.base
        stop_ids = [] if base.end is None else [base.end]
        message = {"op": "generate", "prompt": ids, "stop_ids": stop_ids, **options}
        answer = await self._service.infer(model, message)
        made, reason = answer["ids"], "length"
        if answer["finished"]:
            reason = "stop"
        text = self._service.text.text(made[:-1] if answer["finished"] else made)
        found = [at for s in stops if (at := text.find(s)) >= 0]
        if found:
            text, reason = text[: min(found)], "stop"
            offsets = self._service.text.offsets(made)
            made = [i for i, offset in zip(made, offsets, strict=True) if offset < len(text)]
        cut = {k: answer[k][: len(made)] for k in ("logprobs", "top_ids", "top_logprobs")}
        return made, reason, text, cut

    def _answer(
        self,
        prefix: str,
        kind: str,
        model: ServedModel,
        choices: list[dict[str, Any]],
        prompt_tokens: int,
        completion_tokens: int,
        extra: dict[str, Any] | None = None,
    ) -> Response:
        return JSONResponse(
            {
                "id": f"{prefix}-{secrets.token_hex(12)}",
                "object": kind,
                "created": now(),
                "model": model.id,
                "system_fingerprint": model.fingerprint,
                "choices": choices,
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens,
                },
                **(extra or {}),
            }
        )
