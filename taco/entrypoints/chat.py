"""From chat messages to a prompt.

Messages are brought into the form that the chat template reads; then Hugging Face's `apply_chat_template` renders them
in its sandbox. What a template reads is found out by rendering small conversations with it. Messages that it can take
as they are go to it unchanged, so that the prompt is the one that transformers would make.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

from taco.errors import (
    ChatTemplateResolutionError,
    TacoValidationError,
    UnknownPartTypeError,
    UnsupportedFeatureError,
)
from taco.tokenizer.chat_template import read_chat_template
from taco.tool_calls import tool_schema

if TYPE_CHECKING:
    from taco.compat import Behaviour
    from taco.inputs import TokensPrompt

logger = logging.getLogger(__name__)

# Parts that are text, and the key that has it.
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MEDIA_PARTS = (
    "image_url",
    "input_image",
    "image_pil",
    "image_embeds",
    "audio_url",
    "input_audio",
    "audio_embeds",
    "video_url",
    "video_embeds",
    "prompt_embeds",
    "tool_reference",
)
# Arguments of `apply_chat_template` that are ours to set, or concern the tokenization that we do ourselves. So is
# "tokenize", but vLLM lets programs say it.
_RESERVED_KWARGS = frozenset(
    (
        "conversation",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
# A template whose messages have content None where they have tool calls.
_TESTS_FOR_NONE = re.compile(r"\bcontent['\"\])]*\s+is\s+(not\s+)?none\b", re.IGNORECASE)
# What the probing conversations say.
_PROBE = ("taco asks for this", "and for that")
_UNREAD = "nobody reads this"


class ConversationMessage(TypedDict, total=False):
    """A message as a chat template reads it: `role` always, the others where there is something to say.

    Keys that are not named here reach the template too.
    """

    role: str
    content: str | None | list[dict[str, Any]]
    tool_call_id: str | None
    name: str | None
    tool_calls: Iterable[dict[str, Any]] | None
    reasoning: str | None
    reasoning_content: str | None
    tools: list[dict[str, Any]] | None
    task: str | None


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered; the arguments of `LLM.chat` of the same names."""

    chat_template: str | os.PathLike[str] | None = None
    chat_template_content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chat_template_content_format not in ("auto", "string", "openai"):
            raise TacoValidationError(
                'chat_template_content_format must be "auto", "string" or "openai", got '
                f"{self.chat_template_content_format!r}. (vLLM 0.33 has another order of arguments; pass them by "
                "name.)",
                parameter="chat_template_content_format",
                value=self.chat_template_content_format,
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise TacoValidationError(
                "continue_final_message and add_generation_prompt are not compatible; pass "
                "add_generation_prompt=False to continue the final message.",
                parameter="continue_final_message",
            )


class ChatRenderer:
    """Renders conversations with one tokenizer and one set of options.

    Args:
        tokenizer: a Hugging Face tokenizer.
        options: see there.
        behaviour: of a version of vLLM.
        default_template: replaces the tokenizer's template where the options have none.

    Raises:
        ChatTemplateResolutionError: there is no template.
        TacoValidationError: there is one for a tokenizer that encodes chats itself.
    """

    def __init__(
        self, tokenizer: Any, options: ChatOptions, behaviour: Behaviour, default_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._behaviour = behaviour
        kwargs = {key: value for key, value in options.chat_template_kwargs.items() if key != "tokenize"}
        if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
            raise TacoValidationError(
                f"chat_template_kwargs cannot have {reserved}: they are no variables of a template. How prompts are "
                "tokenized and truncated is said in tokenization_kwargs.",
                parameter="chat_template_kwargs",
                value=options.chat_template_kwargs,
            )
        tools = None
        if options.tools is not None:  # functions are described once, and not for each conversation
            tools = [tool_schema(tool) if callable(tool) else tool for tool in options.tools]
        template = kwargs.pop("chat_template", None)
        given = options.chat_template or template
        given = os.fspath(given) if isinstance(given, os.PathLike) else given
        found = _find_template(tokenizer, given or default_template, tools)
        # What is no name of a template of the tokenizer comes back as it was.
        self._template = read_chat_template(found) if given and found == given else found
        if kwargs.pop("sanitize_control_tokens", False):
            raise UnsupportedFeatureError(
                "sanitize_control_tokens=True is not supported: special tokens in messages are taken as such. Remove "
                "them from the messages.",
                parameter="chat_template_kwargs",
            )
        self._kwargs = kwargs | {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
        }
        if self._template is not None:
            self._kwargs["chat_template"] = self._template
        if tools is not None:
            self._kwargs["tools"] = tools

    def render(self, conversation: object) -> str | TokensPrompt:
        """The prompt of a conversation: its text, special tokens included.

        Args:
            conversation: messages, each a dict (or an object with `model_dump`) with "role" and "content".

        Returns:
            Text, to be tokenized without adding special tokens; or token ids, with the text that they show, where the
            tokenizer has no template and encodes chats itself, as those of mistral-common do.

        Raises:
            TacoValidationError: a message is malformed, or the template refused the conversation.
            UnsupportedFeatureError: a message has images, audio or video.
        """
        if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Iterable):
            raise TacoValidationError(
                f"A conversation must be a list of messages, but is of type {type(conversation).__name__}.",
                parameter="messages",
                value=conversation,
            )
        messages = [self._message(message) for message in conversation]
        if not messages:
            raise TacoValidationError("A conversation needs at least one message.", parameter="messages")
        try:
            return self._encode(messages) if self._template is None else self._render(messages)
        except Exception as error:  # a template can raise anything
            from taco.entrypoints.template_error import ChatTemplateError, TemplateError

            kind = ChatTemplateError if isinstance(error, TemplateError) else TacoValidationError
            message = f"The chat template could not be applied: {type(error).__name__}: {error}"
            raise kind(message, parameter="messages") from error

    def _encode(self, messages: list[dict[str, Any]]) -> TokensPrompt:
        token_ids = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **self._kwargs)
        return {"prompt_token_ids": token_ids, "prompt": self._tokenizer.decode(token_ids)}

    def _render(self, messages: list[dict[str, Any]], **changes: Any) -> str:
        """The text of messages of which some may have no "content"."""
        kwargs = self._kwargs | changes
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception:
            if all("content" in message for message in messages):
                raise
            # The template reads the content of every message, those of tool calls alone included.
            assert self._template is not None
            if _TESTS_FOR_NONE.search(self._template):
                text = self._render_with_none(messages, kwargs)
            else:
                empty: str | list[Any] = "" if self._reads_strings else []
                full = [{"content": empty, **message} for message in messages]
                text = self._tokenizer.apply_chat_template(full, tokenize=False, **kwargs)
        assert isinstance(text, str)
        return text

    def _render_with_none(self, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        # The method of the tokenizer leaves keys out whose value is None.
        from transformers.utils.chat_template_utils import render_jinja_template

        full = [{"content": None, **message} for message in messages]
        texts, _ = render_jinja_template([full], **{**self._tokenizer.special_tokens_map, **kwargs})
        text: str = texts[0]
        return text

    # What the template reads

    @cached_property
    def _reads_strings(self) -> bool:
        """Whether content may be a string."""
        wanted = self._options.chat_template_content_format
        if self._template is None or wanted != "auto":
            return wanted != "openai"
        # A template that shows neither form may depend on more than a first message; strings are the usual form.
        return self._shows([{"role": "user", "content": _PROBE[0]}], _PROBE[:1]) or not self._reads_parts

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether content may be a list of parts."""
        wanted = self._options.chat_template_content_format
        if self._template is None or wanted != "auto":
            return wanted != "string"
        parts = [{"type": "text", "text": text, "unread": _UNREAD} for text in _PROBE]
        return self._shows([{"role": "user", "content": parts}], _PROBE)

    @cached_property
    def _reads_argument_texts(self) -> bool:
        """Whether the arguments of a tool call may be JSON text, which is shown as it is."""
        if self._template is None:
            return True
        arguments = f'{{"probe":  "{_PROBE[0]}"}}'  # two spaces: nobody would write it so
        call = {"id": "tacoprobe", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        user = {"role": "user", "content": self._content(_PROBE[1])}
        return self._shows([user, {"role": "assistant", "tool_calls": [call]}], [arguments])

    def _shows(self, messages: list[dict[str, Any]], texts: Sequence[str]) -> bool:
        try:
            rendered = self._render(messages, continue_final_message=False)
        except Exception:  # the template does not take such messages
            return False
        return all(text in rendered for text in texts) and _UNREAD not in rendered

    # Messages

    def _message(self, message: object) -> dict[str, Any]:
        if hasattr(message, "model_dump"):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TacoValidationError(
                f'A message must be a dict with a "role" (a string) and a "content", got {message!r:.200}.',
                parameter="messages",
                value=message,
            )
        new = {key: value for key, value in message.items() if value is not None}
        is_unread = new["role"] == "developer" and "developer" not in (self._template or "")
        if is_unread and self._behaviour.developer_becomes_system:
            new["role"] = "system"
        if "content" in new:
            new["content"] = self._content(new["content"])
        if "tool_calls" in new:
            if isinstance(new["tool_calls"], (str, Mapping)) or not isinstance(new["tool_calls"], Iterable):
                raise TacoValidationError(
                    f"The tool_calls of a message must be a list, got {new['tool_calls']!r:.200}.",
                    parameter="messages",
                    value=message,
                )
            new["tool_calls"] = [self._tool_call(call, message) for call in new["tool_calls"]]
        return new

    def _content(self, content: object) -> str | list[dict[str, Any]]:
        texts = content_texts(content)
        if isinstance(content, str):
            return content if self._reads_strings else [{"type": "text", "text": content}]
        if not self._reads_parts:
            return "\n".join(texts)
        assert isinstance(content, Sequence)
        return [self._part(part, text) for part, text in zip(content, texts, strict=True)]

    def _part(self, part: str | Mapping[str, Any], text: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and (kind == "text" or self._names(kind)):
            return dict(part)
        return {"type": "text", "text": text}

    def _names(self, kind: str | None) -> bool:
        """Whether the template has a use for parts of this type."""
        if self._template is None:
            return kind == "thinking"
        return f"'{kind}'" in self._template or f'"{kind}"' in self._template

    def _tool_call(self, call: Any, message: object) -> Any:
        """A tool call with its arguments as the template reads them; OpenAI's format has JSON text."""
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(arguments, str) or self._reads_argument_texts:
            return call
        try:
            decoded = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            problem = f"The arguments of a tool call are not valid JSON ({error}): {arguments!r:.200}"
            if not self._behaviour.drops_malformed_tool_arguments:
                raise TacoValidationError(f"{problem}.", parameter="messages", value=arguments) from error
            logger.warning("%s; the template gets {} in their place, in this message: %.200r", problem, message)
            decoded = {}
        return {**call, "function": {**function, "arguments": decoded}}


def _find_template(tokenizer: Any, wanted: str | None, tools: list[Any] | None) -> str | None:
    """The text of the template; None for a tokenizer that encodes chats itself."""
    try:
        template: str = tokenizer.get_chat_template(wanted, tools)
    except NotImplementedError:
        if wanted is None:
            return None
        raise TacoValidationError(
            "A tokenizer of mistral-common encodes chats itself and takes no chat_template; leave it out, or load the "
            'tokenizer with tokenizer_mode="auto".',
            parameter="chat_template",
            value=wanted,
        ) from None
    except ValueError as error:
        raise ChatTemplateResolutionError(
            "There is no chat template: as of transformers v4.44, default chat template is no longer allowed, so "
            "you must provide a chat template if the tokenizer does not define one. Pass chat_template. "
            f"({error})",
            parameter="chat_template",
        ) from error
    return template


def content_texts(content: object) -> list[str]:
    """The text parts of a message's content.

    Args:
        content: a string, None, or a list of strings and parts (dicts with "type").

    Raises:
        TacoValidationError: another form.
        UnknownPartTypeError: a part of a type that nobody knows.
        UnsupportedFeatureError: images, audio, video, ...
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise TacoValidationError(
            f"The content of a message must be a string or a list of parts, but is of type {type(content).__name__}.",
            parameter="messages",
            value=content,
        )
    return [part if isinstance(part, str) else _part_text(part) for part in content]


def _part_text(part: object) -> str:
    if not isinstance(part, Mapping):
        raise TacoValidationError(
            f"A part of a message's content must be a string or a dict, but is of type {type(part).__name__}.",
            parameter="messages",
            value=part,
        )
    kind = part.get("type")
    if kind is None:  # the key that a part has tells what it is
        kind = next((known for known in (*_TEXT_PARTS, *_MEDIA_PARTS) if known in part), None)
    if kind in _MEDIA_PARTS:
        raise UnsupportedFeatureError(
            f"Content parts of type {kind!r} are not supported: this version of taco takes text alone.",
            parameter="messages",
            value=kind,
        )
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise UnknownPartTypeError(
            f"Unknown part type: {kind!r} (Unsupported chat content part type: {kind!r}); known are "
            f"{list(_TEXT_PARTS)}.",
            parameter="messages",
            value=kind,
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise TacoValidationError(
            f'A content part of type {kind!r} needs a string under "{_TEXT_PARTS[kind]}", got {text!r:.80}.',
            parameter="messages",
            value=part,
        )
    return text


def split_conversations(messages: object) -> list[object]:
    """Splits the `messages` argument into conversations; only its first element is looked at.

    A list whose first element is a message is one conversation. A list of lists is many.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TacoValidationError(
            "messages must be a list of messages or a list of conversations, but is of type "
            f"{type(messages).__name__}.",
            parameter="messages",
            value=messages,
        )
    items = list(messages)
    if items and is_message(items[0]):
        return [items]
    return items


def is_message(value: object) -> bool:
    """Whether `value` is one message rather than a conversation."""
    return isinstance(value, Mapping) or hasattr(value, "model_dump")
