"""When a sequence ends, as far as token ids tell. Stop strings need text: see `taco.engine.output_processor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taco.request import Request, RequestStatus

if TYPE_CHECKING:
    from taco.sampling_params import RepetitionDetectionParams


def check_stop(request: Request) -> RequestStatus | None:
    """The final status of a request after its last token, or None if it goes on; sets `stop_reason`.

    The order is the reference's: end of sequence, stop ids, repetition, length; none but length before `min_tokens`.
    """
    params = request.params
    if request.num_output_tokens >= params.min_tokens:
        last = request.token_ids[-1]
        if last == request.eos_token_id:
            return RequestStatus.FINISHED_STOPPED
        if last in request.stop_token_ids:
            request.stop_reason = last
            return RequestStatus.FINISHED_STOPPED
        if params.repetition_detection is not None and repeats(request, params.repetition_detection):
            request.stop_reason = "repetition_detected"
            return RequestStatus.FINISHED_REPETITION
    if len(request.token_ids) >= request.max_total_tokens:
        return RequestStatus.FINISHED_LENGTH
    return None


def repeats(request: Request, detection: RepetitionDetectionParams) -> bool:
    """Whether the output ends in one pattern, of a size in the given range, `min_count` times in a row."""
    tokens = request.token_ids
    end = len(tokens)
    for size in range(max(1, detection.min_pattern_size), detection.max_pattern_size + 1):
        length = size * detection.min_count
        if length > request.num_output_tokens:
            break
        # A tail has period `size` exactly when it equals itself shifted by `size`.
        if tokens[end - length + size :] == tokens[end - length : end - size]:
            return True
    return False
