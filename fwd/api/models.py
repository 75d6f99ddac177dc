"""What is served, and its tokenizer: `/v1/models`, `/tokenize`, `/detokenize`."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from fwd.api.body import reading
from fwd.api.context import CREATED, SERVICE, serving
from fwd.api.openai.parameters import ModelName
from fwd.api.replies import reply
from fwd.errors import BadRequestError
from fwd.front.bounds import over_context
from fwd.front.prompts import Chat
from fwd.front.service import Service
from fwd.protocol.ids import unpack_ids
from fwd.protocol.values import TokenId
from fwd.text.tokenizer import Tokenizer

INLINE_IDS = 4096


class TokenizeBody(msgspec.Struct):
    """A text or a chat to be encoded."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: ModelName | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """Ids to be decoded."""

    tokens: list[TokenId]
    model: ModelName | None = None


_tokenize = msgspec.json.Decoder(TokenizeBody)
_detokenize = msgspec.json.Decoder(DetokenizeBody)


async def get_models(request: web.Request) -> web.Response:
    """The list of the one model."""
    return reply({"object": "list", "data": [_card(request)]})


async def get_model(request: web.Request) -> web.Response:
    """The model by its id."""
    request.app[SERVICE].check_model(request.match_info["model"])
    return reply(_card(request))


async def post_tokenize(request: web.Request) -> web.Response:
    """Ids of a text or a chat, as a request with it would see them."""
    async with reading(request, _tokenize) as body:
        service = serving(request, body.model)
        ids = await _encode(service, body)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.info().context}
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(_texts, service.prompts.tokenizer, ids)
    return reply(answer)


async def post_detokenize(request: web.Request) -> web.Response:
    """The text of ids, special tokens included."""
    async with reading(request, _detokenize) as body:
        service = serving(request, body.model)
    info, count = service.info(), len(body.tokens)
    if count > info.context:
        raise over_context(info, f"you sent {count} tokens", "tokens")
    if max(body.tokens, default=0) >= info.vocab_size:
        raise BadRequestError(f"an id in tokens is outside the vocabulary 0…{info.vocab_size - 1}", param="tokens")
    decode = service.prompts.tokenizer.decode
    text = decode(body.tokens) if count <= INLINE_IDS else await asyncio.to_thread(decode, body.tokens)
    return reply({"prompt": text})


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token) for token in ids]


async def _encode(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequestError("give either prompt or messages", param="prompt")
    if body.messages is None:
        return await service.prompts.tokenizer.encode_async(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    chat = Chat(
        messages=body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
        kwargs=body.chat_template_kwargs or {},
    )
    return list(unpack_ids(await service.prompts.chat(chat)))


def _card(request: web.Request) -> dict[str, Any]:
    service = request.app[SERVICE]
    return {
        "id": service.config.served_name,
        "object": "model",
        "created": request.app[CREATED],
        "owned_by": "fwd",
        "max_model_len": service.info().context,
    }
