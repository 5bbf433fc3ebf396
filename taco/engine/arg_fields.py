"""What the fields of `EngineArgs` are made of.

A rule says which values a field takes, from Python and from the command line; a treatment says what happens to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import numbers
import operator
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from taco import envs
from taco.config import ProfilerConfig, ReasoningConfig
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import StructuredOutputsConfig
from taco.logits_processor import load_logits_processors
from taco.pooling_params import PoolerConfig
from taco.reasoning import MARKS
from taco.watermark import WatermarkConfig


@dataclass(frozen=True)
class Rule:
    """A text. Other rules derive from this one.

    Args:
        optional: None is allowed, and empty texts, lists and dicts mean None.
    """

    optional: bool = False

    is_secret: ClassVar[bool] = False  # messages do not show values

    def check(self, value: Any) -> Any:
        """Canonical form of `value`; a ValueError says what it must be."""
        if self.optional and (value is None or _is_empty(value)):
            return None
        return self.check_given(value)

    def check_given(self, value: Any) -> Any:
        """`check` for a value that does not stand for an allowed None."""
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            raise ValueError("must be a text that is not empty")
        return os.fspath(value)

    def from_text(self, text: str) -> Any:
        """A command line argument as the Python value that it stands for."""
        return text

    def flag_options(self) -> dict[str, Any]:
        """Keywords of `argparse.ArgumentParser.add_argument`."""
        return {"type": self._parse_argument}

    def _parse_argument(self, text: str) -> Any:
        try:
            return self.check(self.from_text(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error) if self.is_secret else f"{text!r}: {error}") from None


@dataclass(frozen=True)
class TextList(Rule):
    """A text or a list of texts, as a tuple."""

    def check_given(self, value: Any) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
            raise ValueError("must be a text or a list of texts")
        return tuple(items)

    def flag_options(self) -> dict[str, Any]:
        return {"nargs": "+"}


@dataclass(frozen=True)
class Token(Rule):
    """An access token, or True for the one that `hf auth login` stored."""

    def check_given(self, value: Any) -> str | bool:
        return value if isinstance(value, bool) else cast(str, super().check_given(value))


@dataclass(frozen=True)
class Switch(Rule):
    """True or False; `--name` and `--no-name` on the command line."""

    def check_given(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value

    def flag_options(self) -> dict[str, Any]:
        return {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some values. Others may well mean something to vLLM, so they count as unsupported rather than wrong."""

    values: tuple[Any, ...] = ()

    def check_given(self, value: Any) -> Any:
        for known in self.values:
            if _same(value, known):
                return known
        shown = [*self.values, None] if self.optional else [*self.values]
        raise UnsupportedFeatureError(f"taco supports {_listed(shown)}")

    def from_text(self, text: str) -> Any:
        return type(self.values[0])(text)

    def flag_options(self) -> dict[str, Any]:
        return {**super().flag_options(), "metavar": "{" + ",".join(str(value) for value in self.values) + "}"}


@dataclass(frozen=True)
class DType(OneOf):
    """The name of a data type or a torch.dtype object; the canonical form is "auto" or torch's own name."""

    values: tuple[Any, ...] = ("auto", "half", "float16", "bfloat16", "float", "float32")

    def check_given(self, value: Any) -> str:
        # str() and not isinstance(): this module must not need torch to recognise a torch.dtype.
        name = cast(str, super().check_given(str(value).removeprefix("torch.")))
        return {"half": "float16", "float": "float32"}.get(name, name)


@dataclass(frozen=True)
class Integer(Rule):
    """An integer in a range.

    Args:
        minimum, maximum: the range, both ends included.
        scaled: texts such as "4096", "4k" (4000), "4K" (4096) and "1.5m" are numbers too.
        words: further values and the integers that they stand for; these may lie outside the range.
    """

    minimum: int = 0
    maximum: int | None = None
    scaled: bool = False
    words: tuple[tuple[str, int], ...] = ()

    def check_given(self, value: Any) -> int:
        for word, number in self.words:
            if _same(value, word) or _same(value, number):
                return number
        if isinstance(value, str) and self.scaled:
            value = _parse_scaled_integer(value)
        if hasattr(value, "__index__") and not isinstance(value, bool):
            number = operator.index(value)
            if self.minimum <= number and (self.maximum is None or number <= self.maximum):
                return number
        raise ValueError(f"must be {self._described()}")

    def from_text(self, text: str) -> int | str:
        return text if self.scaled else int(text) if re.fullmatch(r"[+-]?\d+", text) else text

    def _described(self) -> str:
        text = f"an integer of at least {self.minimum}"
        if self.maximum is not None:
            text = f"an integer from {self.minimum} to {self.maximum}"
        if self.scaled:
            text += ' (or a text such as "4k" or "4K")'
        return text + "".join(f", or {word!r}" for word, _ in self.words)


@dataclass(frozen=True)
class Number(Rule):
    """A finite number in a range, whose lower end may be excluded."""

    minimum: float = 0.0
    maximum: float = math.inf
    exclude_minimum: bool = False

    def check_given(self, value: Any) -> float:
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            in_range = self.minimum <= number <= self.maximum and not (self.exclude_minimum and number == self.minimum)
            if in_range and math.isfinite(number):
                return number
        lower = f"above {self.minimum:g}" if self.exclude_minimum else f"of at least {self.minimum:g}"
        upper = "" if math.isinf(self.maximum) else f" and at most {self.maximum:g}"
        raise ValueError(f"must be a number {lower}{upper}")

    def from_text(self, text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text


@dataclass(frozen=True)
class JsonObject(Rule):
    """A dict; JSON on the command line. It may be a callable too where `or_callable` says so."""

    or_callable: bool = False

    def check_given(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if self.or_callable and callable(value):
            return value
        raise ValueError("must be a dict" + (" or a callable" if self.or_callable else ""))

    def from_text(self, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON ({error})") from None


@dataclass(frozen=True)
class PoolerRule(JsonObject):
    """A `PoolerConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> PoolerConfig:
        if isinstance(value, Mapping):
            value = dict(value)
        elif not hasattr(value, "pooling_type"):
            raise ValueError("must be a PoolerConfig or a dict of its fields")
        return PoolerConfig.from_mapping(value)


@dataclass(frozen=True)
class StructuredOutputsRule(JsonObject):
    """A `StructuredOutputsConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> StructuredOutputsConfig:
        return StructuredOutputsConfig.from_mapping(value)


@dataclass(frozen=True)
class ProfilerRule(JsonObject):
    """A `ProfilerConfig`, or its fields as a dict, of which `profiler` may be None for no profiler."""

    def check_given(self, value: Any) -> ProfilerConfig | None:
        given = dict(value) if isinstance(value, Mapping) else dict(vars(value)) if hasattr(value, "__dict__") else {}
        if given.get("profiler", "torch") is None:
            return None
        if not given.get("torch_profiler_dir"):
            raise ValueError('must have a folder for trace files, as in {"torch_profiler_dir": "traces"}')
        fields = {field.name: field for field in dataclasses.fields(ProfilerConfig)}
        for name, setting in given.items():
            if name not in fields or (name == "profiler" and setting != "torch"):
                raise UnsupportedFeatureError(f"{name}={setting!r} is not supported; taco has {_listed([*fields])}")
            default = fields[name].default
            if default is not dataclasses.MISSING and type(setting) is not type(default):
                raise ValueError(f"{name} must be of type {type(default).__name__}")
            if isinstance(setting, int) and setting < 0:
                raise ValueError(f"{name} must be at least 0")
        return ProfilerConfig(**given)


@dataclass(frozen=True)
class ReasoningParser(OneOf):
    """A kind of reasoning model; an empty text for none."""

    values: tuple[Any, ...] = tuple(MARKS)

    def check(self, value: Any) -> str:
        return "" if value is None or value == "" else cast(str, self.check_given(value))


@dataclass(frozen=True)
class ReasoningRule(JsonObject):
    """A `ReasoningConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> ReasoningConfig:
        if isinstance(value, ReasoningConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a ReasoningConfig or a dict of its fields")
        names = [field.name for field in dataclasses.fields(ReasoningConfig)]
        for name, text in value.items():
            if name not in names:
                raise UnsupportedFeatureError(f"{name!r} is not known; there are {_listed(names)}")
            if not isinstance(text, str | None):
                raise ValueError(f"{name} must be a text")
        return ReasoningConfig(**{name: text or "" for name, text in value.items()})


@dataclass(frozen=True)
class WatermarkRule(JsonObject):
    """A `WatermarkConfig`, or its fields as a dict."""

    is_secret = True

    def check_given(self, value: Any) -> WatermarkConfig:
        if isinstance(value, WatermarkConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a WatermarkConfig or a dict of its fields")
        return WatermarkConfig.from_mapping(value)


@dataclass(frozen=True)
class ExecutorRule(Rule):
    """The name of an executor that does, for one device, what the one in this process does."""

    def check_given(self, value: Any) -> str:
        if value not in ("uni", "mp", "external_launcher"):
            raise UnsupportedFeatureError('another executor is not supported; pass "uni", or leave it out')
        if value == "external_launcher" and (num_processes := envs.world_size()) > 1:
            raise UnsupportedFeatureError(
                f"a launcher has started {num_processes} processes (WORLD_SIZE), but an engine runs in one; start "
                "independent processes, each with a part of the prompts"
            )
        return cast(str, value)


@dataclass(frozen=True)
class LogitsProcessorsRule(TextList):
    """Classes of logits processors, or their names, as a tuple of classes."""

    def check_given(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of classes or of their names")
        return load_logits_processors(value)


@dataclass(frozen=True)
class ClassName(Rule):
    """A class, or its "module.name"; an empty text for none."""

    def check_given(self, value: Any) -> str | type:
        if isinstance(value, type) or value == "":
            return cast("str | type", value)
        name = super().check_given(value)
        if not re.fullmatch(r"\w+(\.\w+)+", name):
            raise ValueError('must be a class or its name, as in "package.module.Class"')
        return cast(str, name)


def _same(value: object, known: object) -> bool:
    """Equality that keeps True and 1 apart."""
    return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | tuple | set | dict) and not value


def _listed(values: list[Any]) -> str:
    return ", ".join(repr(value) for value in values)


def _parse_scaled_integer(text: str) -> int | str:
    """The number that "4096", "4k" or "1.5m" (powers of 1000) or "4K" (powers of 1024) mean, or `text` itself.

    A fraction goes with powers of 1000 only, as in vLLM: "1.5K" has no agreed meaning.
    """
    match = re.fullmatch(r"(\d+)(\.\d+)?([kmgt]?|[KMGT])", text.strip())
    if match is None:
        return text
    whole, fraction, suffix = match.groups()
    scale = (1000 if suffix.islower() else 1024) ** " kmgt".index(suffix.lower() or " ")
    if fraction is None:
        return int(whole) * scale
    number = float(whole + fraction) * scale
    return round(number) if suffix.islower() and abs(number - round(number)) < 1e-6 else text


@dataclass(frozen=True)
class Implemented:
    """The field does what `help` says.

    Args:
        help: what it does, for the CLI and the documentation.
        rule: the values it takes.
    """

    help: str
    rule: Rule

    def check(self, name: str, value: Any, default: Any) -> Any:
        """Canonical value of the field; the error names the field."""
        try:
            return self.rule.check(value)
        except ValueError as error:
            cls = UnsupportedFeatureError if isinstance(error, UnsupportedFeatureError) else TacoValidationError
            if self.rule.is_secret:
                raise cls(f"{name}: {error}", parameter=name) from None
            raise cls(f"{name}={value!r}: {error}", parameter=name, value=value) from None


@dataclass(frozen=True)
class Immaterial:
    """The value of the field cannot matter here.

    Args:
        reason: why.
        obsolete: newer versions of vLLM have dropped the name; a value for it makes a DeprecationWarning.
    """

    reason: str
    obsolete: bool = False

    def check(self, name: str, value: Any, default: Any) -> Any:
        if self.obsolete and not _same(value, default):
            warnings.warn(f"{name} has no effect and can go: {self.reason}.", DeprecationWarning, stacklevel=2)
        return value


@dataclass(frozen=True)
class NotBuilt:
    """The feature behind the field does not exist yet.

    Args:
        feature: what a caller who sets the field asks for.
        also: neutral values besides the default.
    """

    feature: str
    also: tuple[Any, ...] = ()

    def check(self, name: str, value: Any, default: Any) -> Any:
        neutral = [default, *self.also]
        if any(_same(value, known) for known in neutral) or (_is_empty(value) and not default):
            return default
        raise UnsupportedFeatureError(
            f"{name}={value!r}: {self.feature} is not supported; {name} can only be {_listed(neutral)}",
            parameter=name,
            value=value,
        )


Treatment = Implemented | Immaterial | NotBuilt


def implemented(default: Any, rule: Rule, help: str, *, show: bool = True) -> Any:
    """A field of `EngineArgs` that does what `help` says; `show=False` keeps a secret out of `repr`."""
    return dataclasses.field(default=default, repr=show, metadata={"treatment": Implemented(help, rule)})


def immaterial(default: Any, reason: str, *, obsolete: bool = False) -> Any:
    """A field of `EngineArgs` that is accepted because of `reason`."""
    return dataclasses.field(default=default, metadata={"treatment": Immaterial(reason, obsolete)})


def not_built(default: Any, feature: str, *, also: tuple[Any, ...] = ()) -> Any:
    """A field of `EngineArgs` that raises unless it has its default, is empty, or is in `also`."""
    return dataclasses.field(default=default, metadata={"treatment": NotBuilt(feature, also)})


def treatment_of(field: dataclasses.Field[Any]) -> Treatment:
    """What happens to the value of a field of `EngineArgs`."""
    return cast(Treatment, field.metadata["treatment"])
