from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from .oracle import make_sampler, new_row


def sample(processors: list[Any], **fields: Any) -> tuple[list[int], dict[int, str]]:
    """Three greedy rows; the middle one has the processors. All want token 4 by themselves."""
    rows = [new_row(0, temperature=0), new_row(1, temperature=0, logits_processors=processors, **fields)]
    rows.append(new_row(2, temperature=0))
    logits = torch.zeros(3, 6)
    logits[:, 4] = 1.0
    output = make_sampler(6, rows).sample([0, 1, 2], logits)
    return output.token_ids.tolist(), output.errors


def want_2(output: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    wanted = torch.zeros_like(logits)
    wanted[2] = 5.0
    return wanted


def want_3_in_place(output: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    logits[3] = 9.0
    return logits


class Wanting5:
    def __call__(self, output: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
        return logits + torch.tensor([0.0, 0, 0, 0, 0, 20])


@pytest.mark.parametrize(
    ("processors", "token_id"),
    [
        ([want_2], 2),
        ([want_3_in_place], 3),
        ([want_2, want_3_in_place], 3),
        ([want_3_in_place, want_2], 2),
        ([Wanting5()], 5),
        ([lambda output, logits: logits.double() * -1], 0),
        ([functools.partial(lambda extra, output, logits: logits.roll(extra), 1)], 5),
    ],
)
def test_what_a_processor_returns_is_used_for_its_row_alone(processors: list[Any], token_id: int) -> None:
    assert sample(processors) == ([4, token_id, 4], {})


def test_ids_are_tuples_and_three_parameters_ask_for_the_prompt() -> None:
    calls: list[tuple[Any, ...]] = []

    def two(output: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append((output,))
        return logits

    def three(prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append((prompt, output))
        return logits

    class Method:
        def process(self, prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
            calls.append((prompt, output))
            return logits

    processors = [two, three, Method().process]
    sampler = make_sampler(6, [new_row(1, [7, 8], [9], temperature=0, logits_processors=processors)])
    sampler.sample([1], torch.zeros(1, 6))
    assert calls == [((9,),), ((7, 8), (9,)), ((7, 8), (9,))]
    calls.clear()
    sampler.append([1], [[4, 5]])
    sampler.sample([1], torch.zeros(1, 6))
    assert calls == [((9, 4, 5),), ((7, 8), (9, 4, 5)), ((7, 8), (9, 4, 5))]


def test_other_numbers_of_parameters_get_two_arguments() -> None:
    def four(output: Any, logits: torch.Tensor, factor: float = 2.0, offset: float = 1.0) -> torch.Tensor:
        assert isinstance(logits, torch.Tensor)
        return logits * factor + offset

    assert sample([four, lambda *arguments: arguments[1]]) == ([4, 4, 4], {})


def test_a_callable_without_a_signature_gets_two_arguments() -> None:
    class Opaque:
        __signature__ = "none"

        def __call__(self, *arguments: Any) -> torch.Tensor:
            assert len(arguments) == 2
            return arguments[-1]

    assert sample([Opaque()]) == ([4, 4, 4], {})


def test_processors_see_the_logits_of_the_model() -> None:
    seen = []

    def look(output: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.tolist())
        return logits

    sample([look], logit_bias={4: 3.0}, bad_words_token_ids=[[1]], repetition_penalty=2.0)
    assert seen == [[0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("processor", "messages"),
    [
        (lambda output, logits: 1 / 0, ["<lambda>", "ZeroDivisionError: division by zero"]),
        (lambda output, logits: None, ["returned NoneType", "must return the tensor"]),
        (lambda output, logits: logits[:5], ["shape [5]", "must have shape [6]"]),
        (lambda output, logits: logits[None], ["shape [1, 6]"]),
        (lambda output, logits: logits.long(), ["torch.int64", "floating-point"]),
        (lambda output: output, ["TypeError"]),
    ],
)
def test_a_failing_processor_is_an_error_of_its_row_alone(processor: Any, messages: list[str]) -> None:
    token_ids, errors = sample([want_2, processor])
    assert (token_ids[0], token_ids[2]) == (4, 4) and 0 <= token_ids[1] < 6
    assert list(errors) == [1]
    assert all(message in errors[1] for message in messages)


def test_an_error_does_not_stay_for_the_next_step() -> None:
    fails = [True]

    def once(output: Any, logits: torch.Tensor) -> torch.Tensor:
        if fails.pop() if fails else False:
            raise RuntimeError("not yet")
        return logits

    sampler = make_sampler(6, [new_row(0, temperature=0, logits_processors=[once])])
    assert "not yet" in sampler.sample([0], torch.zeros(1, 6)).errors[0]
    sampler.append([0], [[1]])
    assert sampler.sample([0], torch.zeros(1, 6)).errors == {}


def test_interrupts_are_not_swallowed() -> None:
    def interrupt(output: Any, logits: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([interrupt])
