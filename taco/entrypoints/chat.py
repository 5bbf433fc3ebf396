"""From chat messages to the text of a prompt.

Messages are brought into the form that the chat template expects; then Hugging Face's `apply_chat_template` renders
them in its sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from taco.errors import TacoValidationError, UnsupportedFeatureError

ContentFormat = str  # "string" or "openai"

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
# Arguments of `apply_chat_template` that are ours to set, or concern the tokenization that we do ourselves.
_RESERVED_KWARGS = frozenset(
    (
        "conversation",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered; the arguments of `LLM.chat` of the same names."""

    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chat_template_content_format not in ("auto", "string", "openai"):
            raise TacoValidationError(
                'chat_template_content_format must be "auto", "string" or "openai", got '
                f"{self.chat_template_content_format!r}.",
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
        default_template: replaces the tokenizer's template where the options have none.

    Raises:
        TacoValidationError: there is no template.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions, default_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = options
        tools = None if options.tools is None else list(options.tools)
        try:
            template = tokenizer.get_chat_template(options.chat_template or default_template, tools)
        except ValueError as error:
            raise TacoValidationError(
                "There is no chat template: as of transformers v4.44, default chat template is no longer allowed, so "
                "you must provide a chat template if the tokenizer does not define one. Pass chat_template. "
                f"({error})",
                parameter="chat_template",
            ) from error
        self._template: str = template
        self._is_openai = (
            detect_content_format(template)
            if options.chat_template_content_format == "auto"
            else options.chat_template_content_format
        ) == "openai"
        kwargs = {key: value for key, value in options.chat_template_kwargs.items() if key not in _RESERVED_KWARGS}
        self._kwargs = kwargs | {
            "chat_template": template,
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
        }
        if tools is not None:
            self._kwargs["tools"] = tools

    def render(self, conversation: object) -> str:
        """The text of the prompt, special tokens included.

        Args:
            conversation: messages, each a dict (or an object with `model_dump`) with "role" and "content".

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
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **self._kwargs)
        except Exception as error:  # a template can raise anything
            raise TacoValidationError(
                f"The chat template could not be applied: {type(error).__name__}: {error}", parameter="messages"
            ) from error
        assert isinstance(text, str)
        return text

    def _message(self, message: object) -> dict[str, Any]:
        if hasattr(message, "model_dump"):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TacoValidationError(
                f'A message must be a dict with a "role" (a string) and a "content", got {message!r:.200}.',
                parameter="messages",
                value=message,
            )
        new = dict(message)
        if new["role"] == "developer" and "developer" not in self._template:
            new["role"] = "system"
        texts = content_texts(new.get("content"))
        # A message of tool calls alone has no content; templates read an empty one, where they would print None.
        new["content"] = [{"type": "text", "text": text} for text in texts] if self._is_openai else "\n".join(texts)
        if new.get("tool_calls") is not None:
            new["tool_calls"] = [_decode_arguments(call) for call in new["tool_calls"]]
        return new


def content_texts(content: object) -> list[str]:
    """The text parts of a message's content.

    Args:
        content: a string, None, or a list of strings and parts (dicts with "type").

    Raises:
        TacoValidationError: another form.
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
    if kind not in _TEXT_PARTS:
        raise TacoValidationError(
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


def _decode_arguments(call: Any) -> Any:
    """A tool call with its arguments as the object that templates expect; OpenAI's format has JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    try:
        decoded = json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        raise TacoValidationError(
            f"The arguments of a tool call are not valid JSON ({error}): {arguments!r:.200}.",
            parameter="messages",
            value=arguments,
        ) from error
    return {**call, "function": {**function, "arguments": decoded}}


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


@lru_cache(maxsize=32)
def detect_content_format(template: str) -> ContentFormat:
    """Which form of message content a chat template reads.

    Returns:
        "openai" if the template loops over the content of a message, so expects a list of parts; else "string".
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Transformers' own tag, which marks the assistant's text and changes nothing else.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return "string"  # rendering will say what is wrong
    content_names: set[str] = set()

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Filter):
            return is_content(node.node)
        if isinstance(node, nodes.CondExpr):
            return is_content(node.expr1) or is_content(node.expr2)
        if isinstance(node, (nodes.Or, nodes.And)):
            return is_content(node.left) or is_content(node.right)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return is_content(node.node)
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in content_names

    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    num_known = -1
    while num_known < len(content_names):  # a name may get its meaning from another one
        num_known = len(content_names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and is_content(assign.node):
                content_names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            names = macros.get(call.node.name, []) if isinstance(call.node, nodes.Name) else []
            content_names.update(name for name, arg in zip(names, call.args, strict=False) if is_content(arg))
            content_names.update(kwarg.key for kwarg in call.kwargs if kwarg.key in names and is_content(kwarg.value))
    return "openai" if any(is_content(loop.iter) for loop in tree.find_all(nodes.For)) else "string"
