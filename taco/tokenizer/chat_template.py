"""Chat templates that callers give."""

from __future__ import annotations

from pathlib import Path

from taco.errors import TacoValidationError


def read_chat_template(template: str | None) -> str | None:
    """The text of a template that is given as a file or as itself."""
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # text that is no UTF-8, and names with a null in them, are ValueErrors
        raise TacoValidationError(
            f"chat_template={template!r}: no Jinja template (it has no brace), and no file that can be read ({error})",
            parameter="chat_template",
            value=template,
        ) from None
