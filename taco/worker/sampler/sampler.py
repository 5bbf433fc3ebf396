"""The sampler: draws the next token of each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from taco.kernels.sampling import draw, drop_below, max_token
from taco.kernels.token_mask import apply_token_mask, draw_allowed
from taco.logits_processor import LogitsProcessor
from taco.plan import Candidates, LogprobRows, NewRow
from taco.watermark import WatermarkConfig
from taco.worker.sampler.batch_processors import BatchProcessors
from taco.worker.sampler.candidates import CandidateTokens, candidates_to_host
from taco.worker.sampler.constraints import (
    AllowedTokens,
    BannedPhrases,
    BannedTokens,
    LogitBias,
    MinTokens,
    NoRepeatNgrams,
)
from taco.worker.sampler.draw import Draw, Trace, draw_filtered
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.filters import Filters, Temperature
from taco.worker.sampler.guided import GuidedText
from taco.worker.sampler.logprobs import Logprobs, Scores, ScoresInTransit, to_host
from taco.worker.sampler.penalties import Penalties
from taco.worker.sampler.processors import LogitsProcessors
from taco.worker.sampler.tables import select_rows
from taco.worker.sampler.thinking import ThinkingBudget
from taco.worker.sampler.watermark import Watermark
from taco.worker.transfer import to_device

if TYPE_CHECKING:
    from taco.guided.compiler import GrammarCompiler

# Logits handled at a time. Temporaries are at most six times as large, in bytes: 100 MB on a CPU, where smaller blocks
# also stay in the cache.
BLOCK_ENTRIES_CPU = 1 << 22
BLOCK_ENTRIES = 1 << 24
_MAX_FORCED = 256  # tokens of a row in one step, about: finding them takes time in which all rows wait


@dataclass
class SamplerOutput:
    """What one call of `Sampler.sample` drew.

    Args:
        token_ids: int64 [N] on the device; some valid id where the row has an error.
        peaks: float32 [N], the largest logit of each row after all edits.
        processor_errors: by position, what went wrong in callers' logits processors and in grammars.
        scores: positions, and the log-probabilities at them.
        candidates: positions, and token ids and log-probabilities of the most likely tokens at them; what was drawn
            there is void.
    """

    token_ids: torch.Tensor
    peaks: torch.Tensor
    processor_errors: dict[int, str] = field(default_factory=dict)
    scores: list[tuple[np.ndarray, Scores]] = field(default_factory=list)
    candidates: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def start_copies(self) -> None:
        """Starts to copy to the host what is read there; an event that is recorded next says that it has arrived."""
        self.peaks = _start_copy(self.peaks)
        self.scores = [(positions, Scores(*map(_start_copy, scores))) for positions, scores in self.scores]
        self.candidates = [(positions, *map(_start_copy, tensors)) for positions, *tensors in self.candidates]

    @cached_property
    def errors(self) -> dict[int, str]:
        """Position -> why no token could be drawn there; waits for the device."""
        peaks = self.peaks.cpu().numpy()
        errors = {}
        for position in np.flatnonzero(~np.isfinite(peaks)).tolist():
            if peaks[position] == -np.inf:
                errors[position] = (
                    "every token is ruled out (all logits are -inf): together, the constraints of this request "
                    "(allowed_token_ids, bad_words, guided decoding, min_tokens, no_repeat_ngram_size, logits "
                    "processors) leave none"
                )
            else:
                errors[position] = "the logits are not finite (NaN or +inf), so no token can be drawn"
        return errors | self.processor_errors

    def logprob_rows(self) -> dict[int, LogprobRows]:
        """Position -> the log-probabilities of the token drawn there, for the rows that asked; waits for the device."""
        rows = {}
        for (positions, _), part in zip(self.scores, to_host([scores for _, scores in self.scores]), strict=True):
            for index, position in enumerate(positions.tolist()):
                rows[position] = part[index : index + 1]
        return rows

    def candidate_rows(self) -> dict[int, Candidates]:
        """Position -> the most likely tokens there, for the rows that want them; waits for the device."""
        return candidates_to_host(self.candidates)


class Sampler:
    """Draws tokens for rows, each with its own parameters.

    Logits go through, in this order: the caller's logits processors, grammars, allowed ids, bad words, n-grams, logit
    bias, minimum length, the engine's logits processors; penalties; temperature; top-k, top-p, min-p. Then the most
    likely token is taken (greedy rows), or one is drawn; a marked row draws with the numbers of the watermark, and a
    row that follows a trace takes the trace's token instead. Where a budget of reasoning is used up, the end mark comes
    whatever the rest says. A row's result depends on its logits, its parameters, its tokens and its seed, not on its
    neighbours.

    The sampler counts the tokens of a row by itself: those it was given by `add` and `append`, and those that it drew
    and that were not appended yet. So it may be called again before the last tokens are known to the host. A row number
    may occur several times in one call (speculation): its logits then belong to consecutive positions.

    Args:
        vocab_size: columns of the logits.
        max_num_rows: row numbers are below this.
        device: of the logits.
        logprobs_mode: see `taco.worker.sampler.logprobs.Logprobs`.
        rank_counts_ties: likewise.
        processes_prompt: "processed" modes show the prompt after temperature and filters; else it is never processed.
        grammars: of the rows that have constraints; None where no row has one.
        guided_after_reasoning: see `taco.worker.sampler.guided.GuidedText`.
        watermark_config: how rows with `watermarking` are marked.
        logits_processors: those of the engine; with them, a call is not divided, and has each row once.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_num_rows: int,
        device: torch.device,
        logprobs_mode: str = "processed_logprobs",
        rank_counts_ties: bool = False,
        processes_prompt: bool = True,
        grammars: GrammarCompiler | None = None,
        guided_after_reasoning: bool = False,
        watermark_config: WatermarkConfig | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._vocab_size = vocab_size
        self._block_rows = max(1, (BLOCK_ENTRIES_CPU if device.type == "cpu" else BLOCK_ENTRIES) // vocab_size)
        if logits_processors:
            self._block_rows = max_num_rows
        late = [processor for processor in logits_processors if processor.is_argmax_invariant()]
        early = [processor for processor in logits_processors if processor not in late]
        self._processors = LogitsProcessors()
        self._guided = (
            None if grammars is None else GuidedText(vocab_size, max_num_rows, grammars, guided_after_reasoning)
        )
        self._temperature = Temperature(max_num_rows, device)
        self._filters = Filters(vocab_size, max_num_rows, device)
        self._draw = Draw(max_num_rows)
        self._trace = Trace()
        self._watermark = Watermark(watermark_config, max_num_rows)
        self._logprobs = Logprobs(vocab_size, max_num_rows, logprobs_mode, rank_counts_ties)
        self._processes_prompt = processes_prompt and not self._logprobs.raw
        self._candidates = CandidateTokens(vocab_size, max_num_rows, self._logprobs.raw)
        self._edits: tuple[Feature, ...] = (
            self._processors,
            *(() if self._guided is None else (self._guided,)),
            AllowedTokens(vocab_size, max_num_rows),
            BannedTokens(vocab_size, max_num_rows),
            BannedPhrases(vocab_size, max_num_rows),
            NoRepeatNgrams(vocab_size, max_num_rows),
            LogitBias(vocab_size, max_num_rows),
            MinTokens(vocab_size, max_num_rows, None if self._guided is None else self._guided.must_stop),
            BatchProcessors(early),
            Penalties(vocab_size, max_num_rows, device),
            self._temperature,
            BatchProcessors(late),
            ThinkingBudget(max_num_rows),  # the last word
        )
        self._features: tuple[Feature, ...] = (
            *self._edits,
            self._filters,
            self._draw,
            self._trace,
            self._watermark,
            self._logprobs,
            self._candidates,
        )
        self._bits = {feature: 1 << index for index, feature in enumerate(self._features)}
        self._of_bits: dict[int, tuple[Feature, ...]] = {}  # of the combinations that have occurred
        # Those that change logits in place before their log-probabilities are taken; marked rows have filters applied.
        self._edit_bits = sum(self._bits[feature] for feature in (*self._edits, self._watermark))
        # What cannot rule a token out, nor wants to know how it came about.
        harmless = (GuidedText, LogitBias, Penalties, Temperature, Filters, Draw)
        self._harmless_bits = self._bits_of(*harmless)
        # What has done its work, or can do it, before a grammar rules tokens out.
        self._before_grammar_bits = (
            self._bits_of(
                *(LogitsProcessors, AllowedTokens, BannedTokens, BannedPhrases, NoRepeatNgrams, MinTokens, Logprobs),
                *harmless,
            )
            & ~self._bits[self._filters]
        )
        self._output_bits = sum(bit for feature, bit in self._bits.items() if feature.follows_output)

        self._in_use = np.zeros(max_num_rows, bool)
        self._uses = np.zeros(max_num_rows, np.int64)  # bits of the features that the row uses
        self._num_prompt_tokens = np.zeros(max_num_rows, np.int64)
        self._num_tokens = np.zeros(max_num_rows, np.int64)  # prompt and output, as far as the host knows them
        self._num_drawn = np.zeros(max_num_rows, np.int64)  # drawn after those
        self._prompt_logprobs = np.zeros(max_num_rows, np.int64)

    # Rows

    def add(self, new: NewRow) -> None:
        """Takes a row in; its number must be free."""
        row = new.row
        assert not self._in_use[row], f"row {row} is in use"
        self._in_use[row] = True
        self._num_prompt_tokens[row] = new.num_prompt_tokens
        self._num_tokens[row] = len(new.token_ids)
        self._num_drawn[row] = 0
        self._prompt_logprobs[row] = new.params.prompt_logprobs or 0
        self._uses[row] = sum(bit for feature, bit in self._bits.items() if feature.add(new))

    def remove(self, row: int) -> None:
        """Forgets a row."""
        assert self._in_use[row], f"row {row} is not in use"
        for feature in self._features_of(int(self._uses[row])):
            feature.remove(row)
        self._uses[row] = 0
        self._in_use[row] = False

    def append(self, rows: Sequence[int], token_ids: Sequence[list[int]]) -> None:
        """Tokens that were drawn for distinct rows and are known to the host now; also accepted drafts."""
        index = np.asarray(rows, np.int64)
        counts = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
        self._num_tokens[index] += counts
        self._num_drawn[index] = np.maximum(self._num_drawn[index] - counts, 0)
        followed = self._uses[index] & self._output_bits
        for place in np.flatnonzero(followed).tolist():
            for feature in self._features_of(int(followed[place])):
                feature.append(rows[place], token_ids[place])

    def rollback(self, row: int, num_tokens: int) -> None:
        """Forgets the last `num_tokens` tokens of a row: first those drawn and not appended, then appended ones."""
        drawn = min(num_tokens, int(self._num_drawn[row]))
        self._num_drawn[row] -= drawn
        num_tokens -= drawn
        if num_tokens:
            self._num_tokens[row] -= num_tokens
            assert self._num_tokens[row] >= self._num_prompt_tokens[row], f"row {row} has no so many output tokens"
            for feature in self._features_of(int(self._uses[row]) & self._output_bits):
                feature.rollback(row, num_tokens)

    def needs_host_tokens(self, row: int) -> bool:
        """Whether tokens drawn for the row must be appended before its next draw."""
        return bool(self._uses[row] & self._output_bits)

    def guided(self, rows: Sequence[int]) -> np.ndarray:
        """Places in `rows` of those with a grammar."""
        if self._guided is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(self._uses[np.asarray(rows, np.int64)] & self._bits[self._guided])

    def take_forced(self, row: int) -> list[int]:
        """Takes the tokens that must follow, as if they had been drawn and appended, and returns them.

        They are those to which the grammar of a `guided` row leaves no alternative, if nothing else rules tokens out
        for it and it wants to know nothing more about them. Of very many the rest comes in later steps, for which
        other rows need not wait.
        """
        assert self._guided is not None
        if int(self._uses[row]) & ~self._harmless_bits:
            return []
        forced: list[int] = []
        while len(forced) < _MAX_FORCED and (tokens := self._guided.forced(row)):
            self.append([row], [tokens])
            forced += tokens
        return forced

    def is_over(self, row: int) -> bool:
        """Whether a `guided` row has ended: its text is complete, and a token that ends it has been appended."""
        assert self._guided is not None
        return self._guided.is_over(row)

    def _bits_of(self, *kinds: type[Feature]) -> int:
        return sum(bit for feature, bit in self._bits.items() if isinstance(feature, kinds))

    def _features_of(self, bits: int) -> tuple[Feature, ...]:
        if bits not in self._of_bits:
            self._of_bits[bits] = tuple(feature for feature, bit in self._bits.items() if bits & bit)
        return self._of_bits[bits]

    # Tokens

    def sample(self, rows: Sequence[int], logits: torch.Tensor) -> SamplerOutput:
        """Draws a token for each row of logits.

        Args:
            rows: row numbers, N >= 1.
            logits: float32 [N, vocab] on the device; may be changed.
        """
        index = np.asarray(rows, np.int64)
        assert logits.shape == (len(index), self._vocab_size) and logits.dtype == torch.float32, logits.shape
        logits = logits.contiguous()
        ahead = self._num_drawn[index]
        counts = np.bincount(index, minlength=len(self._num_drawn))
        if counts.max() > 1:
            ahead = ahead + _earlier_occurrences(index)
        assert not (ahead[self._uses[index] & self._output_bits != 0]).any(), "a row's last tokens were not appended"
        self._num_drawn += counts
        positions = self._num_tokens[index] + ahead
        block = self._block_rows
        outputs = []
        for start in range(0, len(index), block):
            part = slice(start, start + block)
            outputs.append(self._sample_block(index[part], positions[part], logits[part]))
        if len(outputs) == 1:
            return outputs[0]
        whole = SamplerOutput(
            torch.cat([output.token_ids for output in outputs]), torch.cat([output.peaks for output in outputs])
        )
        for start, output in zip(range(0, len(index), block), outputs, strict=True):
            whole.processor_errors.update({start + place: text for place, text in output.processor_errors.items()})
            whole.scores += [(start + places, scores) for places, scores in output.scores]
            whole.candidates += [(start + places, *candidates) for places, *candidates in output.candidates]
        return whole

    def _sample_block(self, rows: np.ndarray, positions: np.ndarray, logits: torch.Tensor) -> SamplerOutput:
        uses = self._uses[rows]
        used = int(np.bitwise_or.reduce(uses))

        def select(feature: Feature) -> Selection | None:
            bit = self._bits[feature]
            if not used & bit:
                return None
            places = np.flatnonzero(uses & bit)
            chosen = rows[places]
            return Selection(places, chosen, positions[places] - self._num_prompt_tokens[chosen])

        scored = select(self._logprobs)
        reported = None  # logits whose log-probabilities are reported, of the `scored` rows
        if scored is not None and self._logprobs.raw:
            reported = select_rows(logits, scored.positions)
            if reported is logits and used & self._edit_bits:
                reported = logits.clone()
        chosen_by_host = select(self._candidates)
        raw_logits = None
        if chosen_by_host is not None and self._candidates.raw:
            raw_logits = select_rows(logits, chosen_by_host.positions)
            if raw_logits is logits and used & self._edit_bits:
                raw_logits = logits.clone()
        guided_last = None  # rows whose grammars have the last word, and so perhaps need no mask
        for feature in self._edits:
            selection = select(feature)
            if feature is self._guided and selection is not None:
                selection, guided_last = self._split(selection, uses)
            if selection is not None:
                feature.apply(selection, logits)
        peaks, token_ids = max_token(logits)
        output = SamplerOutput(token_ids, peaks, self._processors.take_errors())

        if used & (self._bits[self._draw] | self._bits[self._filters]):
            self._draw_tokens(rows, positions, uses, logits, output)
        if guided_last is not None:
            self._draw_allowed(guided_last, positions, uses, logits, output)
        if self._guided is not None:
            output.processor_errors |= self._guided.take_errors()
        marked = select(self._watermark)
        if marked is not None:
            self._watermark.replace(marked, positions[marked.positions], logits, peaks, token_ids)
        traced = select(self._trace)
        if traced is not None:
            self._trace.replace(traced, token_ids)
        if scored is not None:
            if reported is None:
                reported = select_rows(logits, scored.positions)
            own = select_rows(token_ids, scored.positions)
            output.scores += self._logprobs.collect(scored, reported, own)
        if chosen_by_host is not None:
            edited = select_rows(logits, chosen_by_host.positions)
            output.candidates += self._candidates.collect(chosen_by_host, edited, raw_logits)
        return output

    def _draw_tokens(
        self, rows: np.ndarray, positions: np.ndarray, uses: np.ndarray, logits: torch.Tensor, output: SamplerOutput
    ) -> None:
        """Replaces the most likely tokens of random rows by drawn ones; applies filters where their result is needed
        later, to be reported or to draw marked tokens."""
        device = logits.device
        is_random = uses & self._bits[self._draw] != 0
        is_filtered = uses & self._bits[self._filters] != 0
        is_marked = uses & self._bits[self._watermark] != 0
        is_reported = is_marked | ((uses & self._bits[self._logprobs] != 0) & (not self._logprobs.raw))
        uniforms = self._draw.uniforms(rows, positions, device)
        plain = np.flatnonzero(is_random & ~is_filtered)
        if len(plain):
            drawn = draw(select_rows(logits, plain), select_rows(uniforms, plain))
            output.token_ids.index_copy_(0, to_device(plain, device), drawn)
        near = np.flatnonzero(is_random & is_filtered)
        if len(near) and device.type == "cpu":
            is_random[near] &= ~self._draw_near_peaks(near, rows, logits, uniforms, output)  # these are done
        filtered = np.flatnonzero(is_filtered & (is_random | is_reported))
        if len(filtered):
            candidates, peaks = select_rows(logits, filtered), select_rows(output.peaks, filtered)
            kept = self._filters.find(rows[filtered], candidates, peaks)
            chosen = np.flatnonzero(is_random[filtered])
            if len(chosen):
                drawn = draw_filtered(candidates, peaks, kept, select_rows(uniforms, filtered))
                output.token_ids.index_copy_(0, to_device(filtered[chosen], device), select_rows(drawn, chosen))
            chosen = np.flatnonzero(is_reported[filtered])
            if len(chosen):
                places = to_device(chosen, device)
                survivors, edges, num_ties = select_rows(candidates, chosen), kept.edge[places], kept.num_ties[places]
                # Another way of adding up probabilities may have left the token that was drawn, by their last bit.
                own = survivors.gather(1, select_rows(output.token_ids, filtered[chosen])[:, None])[:, 0]
                num_ties = torch.where(own < edges, self._vocab_size, num_ties)
                drop_below(survivors, torch.minimum(edges, own), num_ties)
                if survivors is not logits:
                    logits.index_copy_(0, to_device(filtered[chosen], device), survivors)

    def _draw_near_peaks(
        self, places: np.ndarray, rows: np.ndarray, logits: torch.Tensor, uniforms: torch.Tensor, output: SamplerOutput
    ) -> np.ndarray:
        """Draws for filtered rows at some places, where few tokens are left; returns for which it has, bool [n]."""
        peaks, own_uniforms = select_rows(output.peaks, places), select_rows(uniforms, places)
        drawn = self._filters.draw_near_peak(rows[places], places, logits, peaks, own_uniforms)
        if drawn is None:
            return np.zeros(len(places), bool)
        is_drawn = drawn.numpy() >= 0
        output.token_ids.numpy()[places[is_drawn]] = drawn.numpy()[is_drawn]
        return is_drawn

    def _split(self, selection: Selection, uses: np.ndarray) -> tuple[Selection | None, Selection | None]:
        """The rows whose grammars rule tokens out before something else acts on the logits, and the others."""
        last = uses[selection.positions] & ~self._before_grammar_bits == 0
        early, late = (Selection(*(part[chosen] for part in selection)) for chosen in (~last, last))
        return early if len(early.rows) else None, late if len(late.rows) else None

    def _draw_allowed(
        self, guided: Selection, positions: np.ndarray, uses: np.ndarray, logits: torch.Tensor, output: SamplerOutput
    ) -> None:
        """Replaces the tokens of guided rows that their grammars do not allow, by allowed ones.

        A greedy row then takes the most likely allowed token. A random row, whose token was drawn from the distribution
        without the grammar, draws again with another number, now among the allowed tokens. That is rejection sampling:
        in the end a token comes with its probability among the allowed ones. On a CPU most rows do without a mask.
        """
        assert self._guided is not None
        device = logits.device
        places, rows = guided.positions, guided.rows
        is_reported = (uses[places] & self._bits[self._logprobs] != 0) & (not self._logprobs.raw)
        rejected = None  # where that is known to the host
        if device.type == "cpu":
            rejected = ~self._guided.allows(rows, places, output.token_ids.numpy()[places].tolist())
            masked = np.flatnonzero(rejected | is_reported)
            if not len(masked):
                return
            places, rows, rejected, is_reported = (each[masked] for each in (places, rows, rejected, is_reported))
        masks = self._guided.masks(rows, places, device)
        if is_reported.any():
            reported = np.flatnonzero(is_reported)
            apply_token_mask(logits, select_rows(masks, reported), to_device(places[reported], device))
        if rejected is not None and not rejected.all():
            again = np.flatnonzero(rejected)
            places, rows, masks = places[again], rows[again], select_rows(masks, again)
        index = to_device(places, device)
        uniforms = self._draw.uniforms(rows, positions[places], device, stream=1)
        peaks, token_ids, drawn = draw_allowed(logits, index, masks, uniforms)
        is_random = uses[places] & self._bits[self._draw] != 0
        token_ids = drawn if is_random.all() else torch.where(to_device(is_random, device), drawn, token_ids)
        # Of logits that are not finite the first look tells, wherever they are.
        keeps_peak = ~((old_peaks := output.peaks[index]) < torch.inf)
        if rejected is None:
            old_ids = output.token_ids[index]
            words = masks.gather(1, (old_ids // 32)[:, None])[:, 0]
            keeps = (words >> (old_ids % 32)) & 1 != 0
            token_ids = torch.where(keeps, old_ids, token_ids)
            keeps_peak |= keeps
        output.token_ids.index_copy_(0, index, token_ids)
        output.peaks.index_copy_(0, index, torch.where(keeps_peak, old_peaks, peaks))

    # The prompt

    def prompt_logprobs(self, row: int, logits: torch.Tensor, next_token_ids: Sequence[int]) -> ScoresInTransit:
        """Log-probabilities of prompt tokens, on their way to the host.

        Of all edits, only temperature and filters can apply; see `processes_prompt`.

        Args:
            row: row number.
            logits: float32 [M, vocab], M >= 1, at the positions before these tokens; not changed.
            next_token_ids: the M tokens.
        """
        token_ids = to_device(np.asarray(next_token_ids, np.int64), logits.device)
        scores = []
        for start in range(0, len(logits), self._block_rows):
            part = slice(start, start + self._block_rows)
            processed = self._process_prompt(row, logits[part]) if self._processes_prompt else logits[part]
            scores.append(self._logprobs.score_prompt(processed, token_ids[part], int(self._prompt_logprobs[row])))
        return ScoresInTransit(scores)

    def prompt_token_id_logprobs(self, logits: torch.Tensor, token_ids: np.ndarray) -> torch.Tensor:
        """Log-probabilities of given tokens, float32 [M, k], on their way to the host; -inf for id -1.

        They are the model's own: neither temperature and filters nor any other edit applies.

        Args:
            logits: float32 [M, vocab], M >= 1; not changed.
            token_ids: int64 [M, k].
        """
        device = logits.device
        parts = []
        for start in range(0, len(logits), self._block_rows):
            part = slice(start, start + self._block_rows)
            parts.append(self._logprobs.score_given(logits[part], to_device(token_ids[part], device)))
        return _start_copy(torch.cat(parts))

    def _process_prompt(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        uses = int(self._uses[row])
        if not uses & (self._bits[self._temperature] | self._bits[self._filters]):
            return logits
        logits = logits.clone()
        places = np.arange(len(logits))
        rows = np.full(len(logits), row)
        if uses & self._bits[self._temperature]:
            self._temperature.apply(Selection(places, rows, places), logits)
        if uses & self._bits[self._filters]:
            kept = self._filters.find(rows, logits, logits.amax(-1))
            drop_below(logits, kept.edge, kept.num_ties)
        return logits


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    # To pinned memory: torch takes such for a copy that the host does not wait for.
    return tensor.to("cpu", non_blocking=True)


def _earlier_occurrences(rows: np.ndarray) -> np.ndarray:
    """For each entry, how many equal ones stand before it, int64 [N]."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    places = np.arange(len(rows))
    counts = np.empty_like(places)
    counts[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return counts
