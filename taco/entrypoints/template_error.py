"""The error of a chat template that refused a conversation; apart, as it needs jinja2."""

from __future__ import annotations

from jinja2 import TemplateError

from taco.errors import TacoValidationError


class ChatTemplateError(TacoValidationError, TemplateError):
    """A chat template raised an error of jinja2, which programs written for vLLM 0.6 may catch as such."""

    message = ""  # of the instance, where jinja2 has a property
