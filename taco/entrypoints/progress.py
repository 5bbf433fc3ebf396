"""The progress bar of `LLM.generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taco.outputs import RequestOutput

_POSTFIX = "est. speed input: {:.2f} toks/s, output: {:.2f} toks/s"


def bar_class(use_tqdm: bool | Callable[..., Any]) -> Callable[..., Any]:
    """What makes the bar: a callable given as `use_tqdm`, else tqdm."""
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    bar: Callable[..., Any] = tqdm
    return bar


class Progress:
    """Counts finished prompts and shows the speed in tokens; use it in a `with` statement.

    Args:
        use_tqdm: False shows nothing; True shows a tqdm bar; a callable is used like the class `tqdm.tqdm`: it takes
            total, desc, dynamic_ncols and postfix, and its result has format_dict, postfix, update, refresh and close.
        total: what is to come; None if unknown.
        counts_samples: each sample of a prompt counts, instead of each prompt.
    """

    def __init__(self, use_tqdm: bool | Callable[..., Any], total: int | None, *, counts_samples: bool = False) -> None:
        self._counts_samples = counts_samples
        self._bar: Any = None
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        if not use_tqdm:
            return
        self._bar = bar_class(use_tqdm)(
            total=total, desc="Processed prompts", dynamic_ncols=True, postfix=_POSTFIX.format(0.0, 0.0)
        )

    def add(self, output: Any) -> None:
        """One more prompt has its output, of either kind."""
        if self._bar is None:
            return
        count = len(output.outputs) if self._counts_samples and isinstance(output, RequestOutput) else 1
        self._num_prompt_tokens += count * len(output.prompt_token_ids or ())
        if isinstance(output, RequestOutput):
            self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0:
            self._bar.postfix = _POSTFIX.format(self._num_prompt_tokens / elapsed, self._num_output_tokens / elapsed)
        self._bar.update(count)

    def step(self) -> None:
        """The engine has done one more step."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
