"""Write docs/api.md, the API reference, from the docstrings of taco's public names.

Usage: python docs/build_api.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ForwardRef, is_typeddict

import taco

TARGET = Path(__file__).with_name("api.md")
HEADER = """\
# API reference

Made from the docstrings by `make docs`; change those instead of this file.
The names below can be imported from `taco`.
"""


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: entries of `Args:` and other indented sections become list items."""
    lines: list[str] = []
    source = inspect.cleandoc(docstring or "").splitlines()
    in_section = False
    for line, following in zip(source, [*source[1:], ""], strict=True):
        if line.endswith(":") and not line.startswith(" ") and following.startswith("    "):
            in_section = True
            lines += [f"*{line.removesuffix(':')}*", ""]
        elif not in_section or not line.startswith("    "):
            in_section = in_section and not line
            lines.append(line)
        elif line.startswith("     "):
            lines.append("  " + line.strip())
        else:
            name, colon, text = line.strip().partition(": ")
            is_entry = colon and re.fullmatch(r"[\w, .*\[\]]+", name)
            lines.append(f"- `{name}`: {text}" if is_entry else line.strip())
    return "\n".join(lines).strip()


def signature(name: str, function: Callable[..., object]) -> str:
    """`name(arguments) -> result` without private arguments, one argument a line where it is long."""
    whole = inspect.signature(function)
    public = [parameter for parameter in whole.parameters.values() if not parameter.name.startswith("_")]
    text = readable(str(whole.replace(parameters=public)))
    if len(name + text) > 100:
        arguments = [readable(str(parameter)) for parameter in public]
        keyword_only = [index for index, parameter in enumerate(public) if parameter.kind is parameter.KEYWORD_ONLY]
        if keyword_only:
            arguments.insert(keyword_only[0], "*")
        result = text[text.rindex(")") + 1 :]
        text = "(\n    " + ",\n    ".join(arguments) + f",\n){result}"
    return name + text


def readable(text: str) -> str:
    """Annotations and defaults as they are written in the source."""
    text = re.sub(r"<([\w.]+): [^>]*>", r"\1", text)
    return text.replace("<factory>", "...").replace("'", "")


def annotation_text(annotation: object) -> str:
    """An annotation of a TypedDict, which keeps it as a forward reference."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)


def is_documented(name: str, member: object) -> bool:
    """Whether a member of a class is a public method or property with a docstring."""
    is_callable = inspect.isfunction(member) or isinstance(member, property | staticmethod | classmethod)
    return is_callable and not name.startswith("_") and bool(inspect.getdoc(member))


def members(cls: type) -> dict[str, object]:
    """What the class defines, then what it has from bases that are no public names themselves."""
    found: dict[str, object] = {}
    for base in cls.__mro__:
        if base is cls or (base.__module__.startswith("taco.") and base.__name__ not in taco.__all__):
            found |= {name: member for name, member in vars(base).items() if name not in found}
    return found


def class_parts(name: str, cls: type) -> Iterator[str]:
    """A class: its signature, docstring, and public methods and properties with docstrings."""
    treated = dataclasses.is_dataclass(cls) and any("treatment" in f.metadata for f in dataclasses.fields(cls))
    if is_typeddict(cls):
        keys = [f"    {key}: {readable(annotation_text(kind))}" for key, kind in cls.__annotations__.items()]
        yield f"```python\nclass {name}(TypedDict):\n" + "\n".join(keys) + "\n```"
    elif not treated:
        yield f"```python\n{signature(name, cls)}\n```"
    yield markdown(cls.__doc__)
    if treated:
        yield from field_tables(cls)
    for member_name, member in members(cls).items():
        if not is_documented(member_name, member):
            continue
        yield f"### `{name}.{member_name}`"
        if not isinstance(member, property):
            is_bound = isinstance(member, staticmethod | classmethod)
            function = getattr(cls, member_name) if is_bound else partial(member, None)
            yield f"```python\n{signature(member_name, function)}\n```"
        yield markdown(inspect.getdoc(member))


def field_tables(cls: type) -> Iterator[str]:
    """Fields of `EngineArgs`, grouped by what happens to their values."""
    titles = {
        "Implemented": ("help", "These do what they say."),
        "Immaterial": ("reason", "These are accepted, and no value of theirs changes a result."),
        "NotBuilt": ("feature", "These raise an error unless they have their default, because the feature is missing."),
    }
    for kind, (attribute, title) in titles.items():
        rows = [f"{title}\n", "| name | default | |", "|---|---|---|"]
        for field in dataclasses.fields(cls):
            treatment = field.metadata["treatment"]
            if type(treatment).__name__ == kind:
                text = str(getattr(treatment, attribute)).replace("|", "\\|")
                rows.append(f"| `{field.name}` | `{field.default!r}` | {text} |")
        yield "\n".join(rows)


def render() -> str:
    """The whole page."""
    parts = [HEADER]
    for name in taco.__all__:
        value = getattr(taco, name)
        if name.startswith("__"):
            continue
        parts.append(f"## `{name}`")
        if inspect.isclass(value):
            parts += class_parts(name, value)
        elif inspect.isfunction(value):
            parts += [f"```python\n{signature(name, value)}\n```", markdown(inspect.getdoc(value))]
        else:
            parts.append(f"```python\n{name} = {re.sub(r'(typing|taco)[a-z_.]*[.]', '', str(value))}\n```")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
