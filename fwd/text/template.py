"""The chat template of a model folder: messages to prompt text, and to token ids that user text cannot forge."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
from jinja2 import Template, TemplateError

from fwd.errors import BadRequestError, ModelError
from fwd.text.files import read_json, read_optional_json, read_text, token_content
from fwd.text.guard import guarded_pieces, private_name
from fwd.text.messages import Chat, Shape, check_options, prepare
from fwd.text.sandbox import RESERVED, compile_template, render_bounded
from fwd.text.tokenizer import Tokenizer

_RESERVED = RESERVED | {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}
_MAX_MESSAGE = 500
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _Named(msgspec.Struct):
    name: str
    template: str


class ChatTemplate:
    """The named templates of one model and the special tokens they write; safe to use from any thread.

    Rendering is bounded in size, not in time: callers run it in a worker. `hash` names the templates' content.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        self.hash = hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in sorted(sources.items())).encode()).hexdigest()[:16]
        self._templates = {name: compile_template(source) for name, source in sources.items()}
        self._tokens = dict(tokens or {})
        self._shape = self._probe() if self._templates else Shape(parts=False, arguments=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read chat_template.jinja, or else tokenizer_config.json, or else chat_template.json.

        A folder without any is not an error here: a base model has none, and rendering says so.
        """
        config = read_json(folder / "tokenizer_config.json")
        tokens = {key: token_content(value) for key, value in config.items() if key.endswith("_token")}
        try:
            return cls(_sources(folder, config), {key: text for key, text in tokens.items() if text is not None})
        except TemplateError as error:
            raise ModelError(f"{folder}: chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the prompt text of a chat. With `continue_final` it ends where the last message's content ends.

        `options` are the caller's own template variables (`chat_template_kwargs`).
        `BadRequestError` carries the template's own message.
        """
        chat = self._chat(messages, tools, options)
        return self._draw(chat, add_generation_prompt, continue_final)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Encode a chat: the token ids of the rendered text, except that added tokens in user text stay text."""
        chat = self._chat(messages, tools, options)
        try:
            pieces = guarded_pieces(
                tokenizer.control, chat, lambda marked: self._draw(marked, add_generation_prompt, continue_final)
            )
        except RecursionError as error:
            raise BadRequestError("messages or tools are nested too deeply", param="messages") from error
        return tokenizer.encode_pieces(pieces)

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any] | None,
    ) -> Chat:
        if not self._templates:
            raise BadRequestError("this model has no chat template: use /v1/completions", param="messages")
        options = dict(options or {})
        check_options(options, _RESERVED | self._tokens.keys())
        return Chat(prepare(messages, self._shape), list(tools) if tools else None, options)

    def _draw(self, chat: Chat, add_generation_prompt: bool, continue_final: bool) -> str:
        if not continue_final:
            return self._render(chat, add_generation_prompt)
        end = private_name() + " "
        text = self._render(chat._replace(messages=_ended(chat.messages, end)), add_generation_prompt=False)
        before, found, after = text.rpartition(end.rstrip())
        if not found:
            raise BadRequestError("the chat template drops the message to be continued", param="messages")
        return before if after.startswith(" ") else before.rstrip()

    def _render(self, chat: Chat, add_generation_prompt: bool) -> str:
        variables = {**self._tokens, **chat.options, "messages": chat.messages, "tools": chat.tools, "documents": None}
        try:
            return render_bounded(self._select(chat), {**variables, "add_generation_prompt": add_generation_prompt})
        except _FAILURES as error:
            message = str(error)[:_MAX_MESSAGE] or type(error).__name__
            raise BadRequestError(f"chat template: {message}", param="messages") from error

    def _select(self, chat: Chat) -> Template:
        if chat.tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates["default"]

    def _probe(self) -> Shape:
        """Try which forms the template handles."""
        text = self._try([{"role": "user", "content": "probe"}])
        parts = self._try([{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"probe": "x"}}}
        user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}
        called = self._try([user, assistant])
        arguments = called is not None and "{'probe'" not in called
        return Shape(parts=text is not None and parts == text, arguments=arguments)

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(Chat(messages, None, {}), add_generation_prompt=False)
        except BadRequestError:
            return None


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name: one alone is the `default`; a list also may have one named `tool_use`."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return {"default": read_text(path)}
    found = config.get("chat_template") or read_optional_json(folder / "chat_template.json").get("chat_template")
    try:
        templates = msgspec.convert(found or [], str | list[_Named])
    except msgspec.ValidationError as error:
        raise ModelError(f"{folder}: chat_template must be a string or a list of named templates ({error})") from error
    if isinstance(templates, str):
        return {"default": templates}
    named = {template.name: template.template for template in templates}
    return named if not named or "default" in named else {**named, "default": templates[0].template}


def _ended(messages: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """Put `end` after the last message's content."""
    *others, last = messages
    match last:
        case {"role": "assistant", "content": str(text)}:
            return [*others, {**last, "content": text + end}]
        case {"role": "assistant", "content": [*parts, {"text": text}]}:
            return [*others, {**last, "content": [*parts, {"type": "text", "text": f"{text}{end}"}]}]
    raise BadRequestError("only an assistant message with content can be continued", param="messages")
