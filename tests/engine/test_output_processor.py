from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.engine.input_processor import InputProcessor, ProcessedRequest
from taco.engine.output_processor import OutputProcessor, find_stop
from taco.engine.stopping import check_stop
from taco.errors import TacoValidationError
from taco.logprobs import FlatLogprobs, Logprob
from taco.outputs import RequestOutput
from taco.plan import LogprobRows
from taco.request import Request, RequestStatus, RequestUpdate
from taco.sampling_params import RequestOutputKind, SamplingParams
from tests.fake_engine import logprob_rows, make_config
from tests.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

EOS = 1
FINAL, CUMULATIVE, DELTA = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA


def ids(text: str) -> list[int]:
    encoded: list[int] = byte_level_tokenizer().encode(text, add_special_tokens=False)
    return encoded


class Harness:
    """One request in an output processor, fed by hand; the stop rules are the scheduler's."""

    def __init__(
        self,
        prompt: object = "hi",
        *,
        version: str = "0.6",
        tokenizer: Any = None,
        request_id: str = "r",
        **params: Any,
    ) -> None:
        config = make_config(version, generation_config={"eos_token_id": [EOS, 2]}, max_model_len=2000)
        tokenizer = tokenizer or byte_level_tokenizer()
        params.setdefault("max_tokens", 1000)
        self.processor = OutputProcessor(config, tokenizer)
        self.processed: ProcessedRequest = InputProcessor(config, tokenizer).process(
            request_id, prompt, SamplingParams(**params)
        )
        self.processor.add(self.processed)
        self.children: list[Request] = self.processed.children
        self.outputs: list[RequestOutput] = []
        self.stopped: list[tuple[Request, str]] = []

    def feed(self, token_ids: list[int], logprobs: LogprobRows | None = None, child: int = 0) -> list[RequestOutput]:
        """One step's tokens of one sequence."""
        return self.feed_all({child: token_ids}, {child: logprobs})

    def feed_all(
        self, tokens: dict[int, list[int]], logprobs: dict[int, LogprobRows | None] | None = None
    ) -> list[RequestOutput]:
        updates = []
        for child, token_ids in tokens.items():
            request = self.children[child]
            if request.status.is_finished:
                continue
            accepted = []
            for token_id in token_ids:
                request.token_ids.append(token_id)
                accepted.append(token_id)
                status = check_stop(request)
                if status is not None:
                    request.status = status
                    break
            rows = (logprobs or {}).get(child)
            if rows is not None and len(rows.ranks) > len(accepted):
                n = len(accepted)
                rows = LogprobRows(rows.token_ids[:n], rows.logprobs[:n], rows.ranks[:n])
            updates.append(RequestUpdate(request, accepted, rows))
        return self.update(updates)

    def update(self, updates: list[RequestUpdate]) -> list[RequestOutput]:
        processed = self.processor.process(updates)
        for request, stop in processed.stopped:
            assert not request.status.is_finished
            request.status = RequestStatus.FINISHED_STOPPED
            self.stopped.append((request, stop))
        self.outputs += processed.outputs
        return processed.outputs

    def finish(self, token_ids: list[int], chunk: int = 1) -> RequestOutput:
        """Feeds tokens until the request ends."""
        for start in range(0, len(token_ids), chunk):
            self.feed(token_ids[start : start + chunk])
        [output] = [output for output in self.outputs if output.finished]
        return output


# What ends a text


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
def test_end_of_sequence_is_in_the_tokens_but_not_in_the_text(kind: RequestOutputKind) -> None:
    [completion] = Harness(output_kind=kind).finish([*ids("hello"), EOS]).outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hello", "stop", None)
    assert completion.token_ids == [*ids("hello"), EOS]
    [completion] = Harness(output_kind=kind).finish([*ids("hello"), 2]).outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hello", "stop", 2)


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
@pytest.mark.parametrize("include", [False, True])
def test_text_of_a_stop_token_is_dropped_unless_included(kind: RequestOutputKind, include: bool) -> None:
    [stop] = ids("!")
    harness = Harness(output_kind=kind, stop_token_ids=[stop], include_stop_str_in_output=include)
    [completion] = harness.finish([*ids("hello"), stop]).outputs
    assert completion.text == ("hello!" if include else "hello") and completion.stop_reason == stop


def test_length_ends_with_all_text() -> None:
    [completion] = Harness(output_kind=FINAL, max_tokens=len(ids("hello"))).finish(ids("hello")).outputs
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hello", "length", None)


def test_other_ends_have_their_reasons() -> None:
    harness = Harness(output_kind=FINAL)
    request = harness.children[0]
    harness.feed(ids("hello"))
    request.status, request.stop_reason = RequestStatus.FINISHED_REPETITION, "repetition_detected"
    request.token_ids += ids("!")
    [output] = harness.update([RequestUpdate(request, ids("!"))])
    assert output.outputs[0].finish_reason == "repetition"
    assert output.outputs[0].stop_reason == "repetition_detected" and output.outputs[0].text == "hello!"


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_row_that_fails_keeps_its_text_and_says_why(kind: RequestOutputKind, logprobs: int | None) -> None:
    harness = Harness(output_kind=kind, logprobs=logprobs)
    tokens = ids("hello")
    rows = logprob_rows([[t] for t in tokens], [[-1.0]] * len(tokens), [1] * len(tokens))
    harness.feed(tokens, None if logprobs is None else rows)
    request = harness.children[0]
    request.status, request.error = RequestStatus.FINISHED_ERROR, "logits are not finite"
    [output] = harness.update([RequestUpdate(request, [])])
    assert output.finished and output.error == "logits are not finite"
    assert output.outputs[0].finish_reason == "error" and output.outputs[0].text == "hello"


# Stop strings


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE, DELTA])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_the_text_where_it_stands(kind: RequestOutputKind, chunk: int, include: bool) -> None:
    harness = Harness(output_kind=kind, stop=["zzz", "o w"], include_stop_str_in_output=include)
    tokens = ids("hello") + ids(" ") + ids("world and more")
    output = harness.finish(tokens, chunk)
    text = "".join(o.outputs[0].text for o in harness.outputs) if kind is DELTA else output.outputs[0].text
    assert text == ("hello w" if include else "hell")
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == "o w"
    assert [stop for _, stop in harness.stopped] == ["o w"]
    # The last token is the one that completed it, however many came in one step.
    got = [t for o in harness.outputs for t in o.outputs[0].token_ids] if kind is DELTA else output.outputs[0].token_ids
    assert tokens[: len(got)] == got and len(got) < len(tokens)
    assert byte_level_tokenizer().decode(got).startswith("hello w")


def test_stop_string_at_the_length_limit_wins_and_needs_no_second_end() -> None:
    tokens = ids("hello") + ids("!")
    harness = Harness(output_kind=FINAL, stop="!", max_tokens=len(tokens))
    [completion] = harness.finish(tokens).outputs
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("stop", "!", "hello")
    assert harness.stopped == []  # the scheduler has ended it already


def test_tokens_of_a_step_in_flight_do_not_revive_a_stopped_sample() -> None:
    harness = Harness(output_kind=FINAL, stop=".", n=2)
    harness.feed(ids("a") + ids("."), child=0)
    request = harness.children[0]
    request.token_ids += ids("b")
    assert harness.update([RequestUpdate(request, ids("b"))]) == []
    [output] = harness.feed([*ids("c"), EOS], child=1)
    assert [c.text for c in output.outputs] == ["a", "c"] and len(output.outputs[0].token_ids) == 2


def test_end_of_sequence_hides_text_that_would_stop() -> None:
    harness = Harness(output_kind=FINAL, stop="</s>", skip_special_tokens=False)
    [completion] = harness.finish([*ids("a"), EOS]).outputs
    assert (completion.text, completion.stop_reason) == ("a", None)


def test_stop_string_that_completes_with_a_later_character() -> None:
    harness = Harness(output_kind=FINAL, stop="😀!")
    [completion] = harness.finish(ids("a😀b😀") + ids("!") + ids("c")).outputs
    assert completion.text == "a😀b" and completion.stop_reason == "😀!"


def test_before_min_tokens_no_stop_string_counts() -> None:
    tokens = [t for char in "a.b.c.d." for t in ids(char)]
    assert len(tokens) == 8
    for min_tokens, text in [(0, "a"), (2, "a"), (3, "a.b"), (5, "a.b.c"), (8, "a.b.c.d")]:
        [completion] = Harness(output_kind=FINAL, stop=".", min_tokens=min_tokens).finish(tokens).outputs
        assert completion.text == text
    for min_tokens, text in [(0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c")]:
        harness = Harness(output_kind=FINAL, stop=".", min_tokens=min_tokens, version="0.33")
        assert harness.finish(tokens).outputs[0].text == text
        assert harness.processor.completes_stop([5], tokens[:2], harness.processed.params) == (min_tokens < 2)


@pytest.mark.parametrize(("version", "ends"), [("0.6", (None, "a</s>")), ("0.33", ("</s", "a</s"))])
def test_an_ending_token_or_a_stop_string_in_its_text_wins(version: str, ends: tuple[str | None, str]) -> None:
    options: dict[str, Any] = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    harness = Harness(output_kind=FINAL, stop="</s", version=version, **options)
    [completion] = harness.finish([*ids("a"), EOS], chunk=2).outputs
    assert (completion.stop_reason, completion.text) == ends
    [completion] = Harness(stop="a", version=version, **options).finish([*ids("a"), EOS], chunk=2).outputs
    assert (completion.stop_reason, completion.text) == ("a", "a")  # one that was complete before


def test_of_several_stop_strings_the_version_decides() -> None:
    text = "hello there."
    assert find_stop(text, 6, ["there", "e"], "list") == ("there", 6)
    assert find_stop(text, 6, ["there", "e"], "earliest") == ("e", 8)
    assert find_stop(text, 1, ["there"], "list") is None  # it ended before the new text
    assert find_stop(text, 1, ["there."], "list") == ("there.", 6)
    [token] = ids("<tool call>")  # one token, so both appear at once
    for version, expected in (("0.6", "call"), ("0.33", "tool")):
        harness = Harness(output_kind=FINAL, stop=["call", "tool"], version=version)
        assert harness.finish([token]).outputs[0].stop_reason == expected


@given(
    text=st.text("ab\n", min_size=1, max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_stop_search_in_new_text_finds_what_a_search_of_the_whole_text_finds(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    end = 0
    for size in sizes:
        start, end = end, min(end + size, len(text))
        found = find_stop(text[:end], end - start, stops, "earliest") if end > start else None
        expected = [(text.find(stop) + len(stop)) for stop in stops if stop in text[:end]]
        assert (found is None) == (not expected)
        if found is not None:
            assert found[1] + len(found[0]) == min(expected)
            break


# What is handed out when


@given(
    data=st.data(), tokens=st.lists(st.integers(0, 321), min_size=1, max_size=15), stop=st.sampled_from([[], ["he"]])
)
@settings(max_examples=100, deadline=None)
def test_all_output_kinds_add_up_to_the_same(data: st.DataObject, tokens: list[int], stop: list[str]) -> None:
    skip = data.draw(st.booleans())
    interval = data.draw(st.sampled_from([None, 2, 5]))
    chunk = data.draw(st.integers(1, 3))
    ends = {}
    for kind in (FINAL, CUMULATIVE, DELTA):
        harness = Harness(
            output_kind=kind,
            stop=stop,
            skip_special_tokens=skip,
            ignore_eos=True,
            stream_interval=interval,
            max_tokens=len(tokens),
        )
        last = harness.finish(tokens, chunk).outputs[0]
        if kind is DELTA:
            parts = [output.outputs[0] for output in harness.outputs]
            last.text = "".join(part.text for part in parts)
            last.token_ids = [token for part in parts for token in part.token_ids]
        elif kind is CUMULATIVE:
            texts = [output.outputs[0].text for output in harness.outputs]
            assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
        else:
            assert len(harness.outputs) == 1
        ends[kind] = (last.text, last.token_ids, last.finish_reason, last.stop_reason)
    assert ends[FINAL] == ends[CUMULATIVE] == ends[DELTA]


def test_streaming_holds_back_what_may_become_a_stop_string() -> None:
    harness = Harness(output_kind=CUMULATIVE, stop="abc")
    assert [harness.feed(ids(char))[0].outputs[0].text for char in "xyab"] == ["", "", "x", "xy"]
    assert harness.feed(ids("d"))[0].outputs[0].text == "xya"
    [output] = harness.feed([EOS])
    assert output.outputs[0].text == "xyabd"


def test_stream_interval_spaces_the_outputs() -> None:
    harness = Harness(output_kind=DELTA, stream_interval=3)
    sizes = [[len(output.outputs[0].token_ids) for output in harness.feed(ids("a"))] for _ in range(8)]
    assert sizes == [[1], [], [], [3], [], [], [3], []]
    assert [len(output.outputs[0].token_ids) for output in harness.feed([EOS])] == [2]


def test_a_chunk_of_the_prompt_is_not_an_output() -> None:
    harness = Harness(output_kind=CUMULATIVE)
    assert harness.update([RequestUpdate(harness.children[0], [])]) == []


def test_cumulative_outputs_do_not_change_afterwards() -> None:
    harness = Harness(output_kind=CUMULATIVE, logprobs=0)
    first = harness.feed(ids("a"), logprob_rows([ids("a")], [[-1.0]], [1]))[0].outputs[0]
    harness.feed(ids("b"), logprob_rows([ids("b")], [[-1.0]], [1]))
    assert first.text == "a" and len(first.token_ids) == 1 and len(first.logprobs or ()) == 1


def test_without_detokenization_there_is_no_text() -> None:
    harness = Harness(output_kind=FINAL, detokenize=False, logprobs=0)
    harness.feed(ids("a"), logprob_rows([ids("a")], [[-1.0]], [1]))
    [output] = harness.feed([EOS], logprob_rows([[EOS]], [[-1.0]], [1]))
    assert output.outputs[0].text == ""
    assert all(entry.decoded_token is None for row in output.outputs[0].logprobs or () for entry in row.values())


# Samples


def test_samples_come_together_by_index() -> None:
    harness = Harness(output_kind=FINAL, n=2)
    assert harness.processor.num_unfinished == 1
    assert harness.feed([*ids("b"), EOS], child=1) == []
    [output] = harness.feed([*ids("a"), EOS], child=0)
    assert output.request_id == "r" and output.finished
    assert [(c.index, c.text) for c in output.outputs] == [(0, "a"), (1, "b")]
    assert harness.processor.num_unfinished == 0


def test_streaming_shows_all_samples_or_the_changed_ones() -> None:
    harness = Harness(output_kind=CUMULATIVE, n=2)
    [output] = harness.feed(ids("b"), child=1)
    assert [(c.index, c.text) for c in output.outputs] == [(0, ""), (1, "b")]
    harness = Harness(output_kind=DELTA, n=2)
    [output] = harness.feed_all({0: ids("a"), 1: ids("b")})
    assert [(c.index, c.text) for c in output.outputs] == [(0, "a"), (1, "b")]
    [output] = harness.feed_all({1: ids("c")})
    assert [(c.index, c.text) for c in output.outputs] == [(1, "c")]


@pytest.mark.parametrize("asked", [None, 0])
def test_best_of_returns_the_likeliest_in_order_and_hides_what_was_not_asked(asked: int | None) -> None:
    harness = Harness(output_kind=FINAL, n=2, best_of=3, logprobs=asked)
    for child, logprob in enumerate([-3.0, -1.0, -2.0]):
        row = logprob_rows([[EOS]], [[logprob]], [1])
        harness.feed(ids("abc"[child]), logprob_rows([ids("abc"[child])], [[logprob]], [1]), child)
        harness.feed([EOS], row, child)
    [output] = harness.outputs
    assert [(c.index, c.text) for c in output.outputs] == [(0, "b"), (1, "c")]
    if asked is None:
        assert all(c.logprobs is None and c.cumulative_logprob is None for c in output.outputs)
    else:
        assert [c.cumulative_logprob for c in output.outputs] == [-2.0, -4.0]


def test_best_of_takes_a_failed_sample_last() -> None:
    harness = Harness(output_kind=FINAL, n=2, best_of=3)
    failed = harness.children[0]
    failed.status, failed.error = RequestStatus.FINISHED_ERROR, "logits are not finite"
    harness.update([RequestUpdate(failed, [])])
    for child in (1, 2):
        harness.feed(ids("abc"[child]), logprob_rows([ids("abc"[child])], [[-float(child)]], [1]), child)
        harness.feed([EOS], logprob_rows([[EOS]], [[-9.0]], [1]), child)
    [output] = harness.outputs
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("b", "stop"), ("c", "stop")]
    assert output.error == "logits are not finite"


# Log-probabilities


def test_logprobs_have_the_drawn_token_first_then_the_best() -> None:
    a, b, c = ids("a") + ids("b") + ids("c")
    harness = Harness(output_kind=FINAL, logprobs=2)
    harness.feed([c], logprob_rows([[c, a, b]], [[-3.0, -0.5, -1.0]], [7]))
    harness.feed([a], logprob_rows([[a, a, b]], [[-0.5, -0.5, -1.0]], [1]))
    harness.feed([b], logprob_rows([[b, -1, -1]], [[-0.25, 0.0, 0.0]], [4]))
    [output] = harness.feed([EOS], logprob_rows([[EOS, a, b]], [[-0.125, -2.0, -3.0]], [1]))
    completion = output.outputs[0]
    assert isinstance(completion.logprobs, list) and len(completion.logprobs) == 4
    assert [list(row) for row in completion.logprobs] == [[c, a, b], [a, b], [b], [EOS, a, b]]
    assert [[entry.rank for entry in row.values()] for row in completion.logprobs] == [
        [7, 1, 2],
        [1, 2],
        [4],
        [1, 1, 2],
    ]
    assert completion.logprobs[0][c].logprob == -3.0 and completion.logprobs[0][c].decoded_token == "c"
    assert completion.cumulative_logprob == -3.0 - 0.5 - 0.25 - 0.125
    assert completion.logprobs[3][EOS].decoded_token == ""


def test_given_tokens_have_no_rank_but_the_drawn_one() -> None:
    a, b = ids("a") + ids("b")
    harness = Harness(output_kind=FINAL, logprob_token_ids=[b])
    [output] = harness.feed([a, EOS], logprob_rows([[a, b], [EOS, b]], [[-1.0, -2.0]] * 2, [3, 4]))
    rows = output.outputs[0].logprobs
    assert rows is not None
    assert [[entry.rank for entry in row.values()] for row in rows] == [[3, None], [4, None]]


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
@pytest.mark.parametrize("stop", [[], ["z" * 99]])
@given(tokens=st.lists(st.integers(0, 321), min_size=1, max_size=12), skip=st.booleans())
@settings(max_examples=40, deadline=None)
def test_decoded_tokens_join_to_the_text_in_06(
    kind: RequestOutputKind, stop: list[str], tokens: list[int], skip: bool
) -> None:
    harness = Harness(
        output_kind=kind, logprobs=1, stop=stop, skip_special_tokens=skip, ignore_eos=True, max_tokens=len(tokens)
    )
    for token in tokens:
        harness.feed([token], logprob_rows([[token, 5]], [[-1.0, -2.0]], [1]))
    completion = harness.outputs[-1].outputs[0]
    assert completion.logprobs is not None
    texts = [row[token].decoded_token or "" for row, token in zip(completion.logprobs, tokens, strict=True)]
    assert "".join(texts) == completion.text


def test_decoded_tokens_in_033_show_special_tokens() -> None:
    harness = Harness(output_kind=FINAL, logprobs=0, version="0.33")
    [output] = harness.feed([*ids("a"), EOS], logprob_rows([ids("a"), [EOS]], [[-1.0]] * 2, [1, 1]))
    assert [entry.decoded_token for row in output.outputs[0].logprobs or () for entry in row.values()] == ["a", "</s>"]


@pytest.mark.parametrize(("version", "text"), [("0.6", "\ufffda"), ("0.33", "a")])
def test_an_unfinished_character_is_no_part_of_decoded_tokens_in_033(version: str, text: str) -> None:
    lead = ids("😀")[0]
    harness = Harness(output_kind=FINAL, logprobs=1, version=version, max_tokens=2)
    [output] = harness.feed([lead, lead], logprob_rows([[lead, *ids("a")]] * 2, [[-1.0, -2.0]] * 2, [1, 1]))
    assert output.outputs[0].logprobs is not None
    assert [row[ids("a")[0]].decoded_token for row in output.outputs[0].logprobs] == ["a", text]


def test_stop_string_cuts_the_logprobs_too() -> None:
    tokens = ids("a") + ids(".") + ids("b")
    harness = Harness(output_kind=FINAL, logprobs=0, stop=".")
    [output] = harness.feed(tokens, logprob_rows([[t] for t in tokens], [[-1.0], [-2.0], [-4.0]], [1, 1, 1]))
    completion = output.outputs[0]
    assert len(completion.logprobs or ()) == len(completion.token_ids) == 2 and completion.cumulative_logprob == -3.0


def test_flat_logprobs_hold_the_same() -> None:
    a, b = ids("a") + ids("b")
    ends = []
    for flat in (False, True):
        harness = Harness("hi", output_kind=FINAL, logprobs=1, prompt_logprobs=1, flat_logprobs=flat)
        prompt = harness.processed.prompt_token_ids
        rest = [[token, b] for token in prompt[1:]]
        rows = logprob_rows(rest, [[-1.0, -2.0]] * len(rest), [3] * len(rest))
        harness.update([RequestUpdate(harness.children[0], [], prompt_logprobs=rows, prompt_logprobs_start=1)])
        [output] = harness.feed([a, EOS], logprob_rows([[a, b], [EOS, a]], [[-1.0, -2.0]] * 2, [1, 2]))
        assert isinstance(output.outputs[0].logprobs, FlatLogprobs) == flat
        ends.append((list(output.outputs[0].logprobs or ()), list(output.prompt_logprobs or ())))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1][0] is None and ends[1][1][0] == {} and ends[0][1][1:] == ends[1][1][1:]


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
def test_prompt_logprobs_come_in_parts_before_or_with_the_last_token(kind: RequestOutputKind) -> None:
    tokenizer = sentencepiece_tokenizer()
    harness = Harness("he ab", tokenizer=tokenizer, output_kind=kind, prompt_logprobs=1, n=2, max_tokens=1)
    prompt = harness.processed.prompt_token_ids
    assert len(prompt) == 3
    first, second = harness.children
    for position in (1, 2):
        rows = logprob_rows([[prompt[position], 300]], [[-1.0, -2.0]], [5])
        # When the step that ends a request is processed, its status is final in all of its updates.
        first.status = RequestStatus.FINISHED_LENGTH if position == 2 else first.status
        assert harness.update([RequestUpdate(first, [], None, rows, position)]) == []
    first.token_ids.append(5)
    harness.update([RequestUpdate(first, [5])])
    [output] = harness.feed([5], child=1)
    assert output.finished and [c.token_ids for c in output.outputs] == [[5], [5]]
    logprobs = output.prompt_logprobs
    assert (
        logprobs is not None
        and logprobs[0] is None
        and [list(row) for row in logprobs[1:]] == [[p, 300] for p in prompt[1:]]
    )
    assert [row[p].decoded_token for row, p in zip(logprobs[1:], prompt[1:], strict=True)] == ["he", " ab"]
    assert logprobs[1][prompt[1]].rank == 5 and logprobs[1][300].rank == 1
    # A prompt of one token has nothing to score.
    assert Harness([9], output_kind=FINAL, prompt_logprobs=0).finish([EOS]).prompt_logprobs == [None]


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
def test_given_tokens_of_the_prompt_make_an_array_once_all_are_there(kind: RequestOutputKind) -> None:
    fields: dict[str, Any] = {"prompt_logprob_token_ids": [[5, 6], [7], [8, 9]], "prompt_logprob_start": 1}
    parts = [(2, [[-1.0, -2.0]]), (2, [[-1.5, -2.5], [-3.0, -np.inf]]), (4, [[-4.0, -5.0]])]  # one comes again
    harness = Harness([1, 2, 3, 4, 5], output_kind=kind, n=2, **fields)
    for start, rows in parts:
        update = RequestUpdate(harness.children[0], [], prompt_token_id_logprobs=(start, np.array(rows, np.float32)))
        assert harness.update([update]) == []
    outputs = [*harness.feed([9]), *harness.feed([EOS]), *harness.feed([EOS], child=1)]
    for output in outputs:
        found = output.prompt_token_id_logprobs
        assert found is not None and found.dtype == np.float32
        assert found.tolist() == [[-1.5, -2.5], [-3.0, -np.inf], [-4.0, -5.0]]
        assert output.prompt_logprobs is None
    assert len(outputs) == (1 if kind is FINAL else 3)
    # What is not whole is not shown.
    harness = Harness([1, 2, 3, 4, 5], output_kind=kind, **fields)
    harness.update([RequestUpdate(harness.children[0], [], prompt_token_id_logprobs=(2, np.zeros((2, 2), np.float32)))])
    output = harness.processor.abort("r")
    assert output is not None and output.prompt_token_id_logprobs is None


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_logprobs_are_made_when_they_are_read_even_after_the_engine_is_gone(stop: list[str]) -> None:
    def num_entries() -> int:
        gc.collect()
        return sum(type(found) is Logprob for found in gc.get_objects())

    a, b = ids("a") + ids("b")
    num_before = num_entries()
    harness = Harness([a, b], output_kind=FINAL, logprobs=1, prompt_logprobs=1, stop=stop)
    rows = logprob_rows([[b, a]], [[-1.0, -2.0]], [1])
    harness.update([RequestUpdate(harness.children[0], [], prompt_logprobs=rows, prompt_logprobs_start=1)])
    harness.feed([a], logprob_rows([[a, b]], [[-1.0, -2.0]], [1]))
    [output] = harness.feed([EOS], logprob_rows([[EOS, b]], [[-0.5, -2.0]], [1]))
    gone = weakref.ref(harness.processor)
    del harness
    assert num_entries() <= num_before and gone() is None
    [completion] = output.outputs
    assert completion.cumulative_logprob == -1.5
    same = pickle.loads(pickle.dumps(output))
    for kept in (output, same):
        assert type(kept.outputs[0].logprobs) is type(kept.prompt_logprobs) is list
        assert kept.outputs[0].logprobs == [
            {a: Logprob(-1.0, 1, "a"), b: Logprob(-2.0, 1, "b")},
            {EOS: Logprob(-0.5, 1, ""), b: Logprob(-2.0, 1, "b")},
        ]
        assert kept.prompt_logprobs == [None, {b: Logprob(-1.0, 1, "b"), a: Logprob(-2.0, 1, "a")}]
    assert output.outputs == same.outputs


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("latest_first", [False, True])
@given(tokens=st.lists(st.integers(0, 321), min_size=1, max_size=9))
@settings(max_examples=20, deadline=None)
def test_streams_show_the_logprobs_of_their_tokens_whenever_they_are_read(
    flat: bool, latest_first: bool, tokens: list[int]
) -> None:
    def outputs(kind: RequestOutputKind) -> list[RequestOutput]:
        harness = Harness(
            [5, 6], output_kind=kind, logprobs=1, flat_logprobs=flat, ignore_eos=True, max_tokens=len(tokens)
        )
        for token in tokens:
            harness.feed([token], logprob_rows([[token, 5]], [[-1.0, -2.0]], [1]))
        for output in reversed(harness.outputs) if latest_first else harness.outputs:
            assert isinstance(output.outputs[0].logprobs, FlatLogprobs if flat else list)
        return harness.outputs

    [final] = outputs(FINAL)
    whole = list(final.outputs[0].logprobs or ())
    assert [next(iter(position)) for position in whole] == tokens
    cumulative = [list(output.outputs[0].logprobs or ()) for output in outputs(CUMULATIVE)]
    assert cumulative == [whole[:end] for end in range(1, len(tokens) + 1)]
    deltas = [list(output.outputs[0].logprobs or ()) for output in outputs(DELTA)]
    assert deltas == [[position] for position in whole]


# Bookkeeping


def test_metrics_are_filled_under_both_names() -> None:
    harness = Harness(output_kind=FINAL)
    request = harness.children[0]
    request.first_scheduled_time = request.arrival_time + 1.0
    request.num_cached_tokens, request.num_preemptions = 2, 3
    output = harness.finish([*ids("a"), EOS])
    metrics = output.metrics
    assert metrics is not None and output.num_cached_tokens == 2
    assert metrics.arrival_time == request.arrival_time and metrics.time_in_queue == 1.0
    assert metrics.first_token_time is not None and metrics.finished_time is not None
    assert metrics.first_token_ts == metrics.first_token_time <= metrics.last_token_time <= metrics.finished_time
    assert metrics.num_generation_tokens == 2 and metrics.num_preemptions == 3


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE])
def test_abort_returns_what_there_is_and_forgets_the_request(kind: RequestOutputKind) -> None:
    harness = Harness(output_kind=kind, n=2)
    assert harness.processor.child_ids("r") == ["0_r", "1_r"]
    harness.feed([*ids("a"), EOS], child=0)
    harness.feed(ids("b"), child=1)
    output = harness.processor.abort("r")
    assert output is not None and output.finished
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("a", "stop"), ("b", "abort")]
    assert harness.processor.num_unfinished == 0 and harness.processor.child_ids("r") == []
    assert harness.processor.abort("r") is None
    # A step in flight may still bring tokens.
    assert harness.feed(ids("c"), child=1) == []


def test_a_request_can_be_aborted_by_one_of_its_sequences() -> None:
    harness = Harness(n=2)
    assert harness.processor.abort("1_r") is not None
    assert harness.processor.num_unfinished == 0


def test_abort_after_a_failed_step_uses_the_tokens_that_have_logprobs() -> None:
    harness = Harness(output_kind=FINAL, logprobs=0)
    harness.feed(ids("a"), logprob_rows([ids("a")], [[-1.0]], [1]))
    harness.children[0].token_ids += ids("b")  # entered by the scheduler, never reported
    output = harness.processor.abort("r")
    assert output is not None and output.outputs[0].text == "a" and len(output.outputs[0].logprobs or ()) == 1


def test_ids_in_use_are_refused() -> None:
    harness = Harness(n=2)
    for request_id in ("r", "0_r"):
        other = Harness(request_id=request_id).processed
        with pytest.raises(TacoValidationError, match="in use by an unfinished request"):
            harness.processor.add(other)


def test_overlong_prompts_are_handed_out_in_the_next_step() -> None:
    harness = Harness([5] * 2001, output_kind=FINAL)
    assert harness.processor.num_unfinished == 1
    [output] = harness.update([])
    assert output.outputs[0].finish_reason == "length" and harness.processor.num_unfinished == 0


def test_finished_requests_leave_no_cycle_of_references() -> None:
    harness = Harness(output_kind=FINAL)
    sequence = weakref.ref(harness.processor._sequences["r"])
    gc.collect()
    gc.disable()
    try:
        harness.finish([EOS])
        assert sequence() is None
    finally:
        gc.enable()
