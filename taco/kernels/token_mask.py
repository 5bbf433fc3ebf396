"""Rows of bits that say which tokens may come next, put over logits.

Grammars and other constraints on the output make such rows on the host, one for each sequence: a bit for each token of
the vocabulary, 32 to a word, together a 32nd of what the logits take.
"""

from __future__ import annotations

import torch

from taco.kernels import native, triton
from taco.kernels.dispatch import op
from taco.kernels.sampling import SUM_CHUNK, draw, max_token

REFERENCE_BLOCK = 1 << 18  # entries handled at a time, so that temporaries stay small


def num_mask_words(vocab_size: int) -> int:
    """How many int32 words one row of bits over the vocabulary takes."""
    return -(-vocab_size // 32)


@op
def apply_token_mask(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> None:
    """Sets the logits of forbidden tokens to -inf, in place.

    Token t is allowed where bit t % 32 (the lowest is bit 0) of word t // 32 is 1. Allowed logits stay as they are, NaN
    too; forbidden ones become -inf whatever they were. Rows of `logits` without a mask are left alone.

    Args:
        logits: float32 [N, vocab].
        masks: int32 [M, num_mask_words(vocab)]. Bits past the vocabulary have no meaning.
        positions: int64 [M], the row of `logits` that each mask belongs to: 0 to N - 1, distinct, in any order.
    """
    vocab = _checked_vocab(logits, masks, positions)
    num_rows = max(1, REFERENCE_BLOCK // vocab)
    places = torch.arange(32, dtype=torch.int32, device=masks.device)
    for words, rows in zip(masks.split(num_rows), positions.split(num_rows), strict=True):
        bits = (words[:, :, None] >> places).bitwise_and_(1).flatten(1)[:, :vocab]
        logits[rows] = torch.where(bits == 1, logits[rows], -torch.inf)


def _checked_vocab(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> int:
    vocab = logits.shape[1]
    assert masks.shape == (len(positions), num_mask_words(vocab)), (logits.shape, masks.shape, positions.shape)
    assert (logits.dtype, masks.dtype, positions.dtype) == (torch.float32, torch.int32, torch.int64)
    return vocab


def _is_packed(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether the entries of a row stand side by side, as kernels other than torch's take them."""
    return logits.stride(1) == masks.stride(1) == 1 and positions.is_contiguous()


@apply_token_mask.candidate("native")
def _apply_token_mask_native(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> None:
    library = native.library()
    if library is None or logits.device.type != "cpu" or not _is_packed(logits, masks, positions):
        return NotImplemented
    vocab = _checked_vocab(logits, masks, positions)
    library.taco_mask(
        logits.data_ptr(),
        logits.stride(0),
        vocab,
        masks.data_ptr(),
        masks.stride(0),
        positions.data_ptr(),
        len(masks),
        torch.get_num_threads(),
    )


@apply_token_mask.candidate("triton")
def _apply_token_mask_triton(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> None:
    if not logits.is_cuda or not triton.usable() or not _is_packed(logits, masks, positions):
        return NotImplemented
    _checked_vocab(logits, masks, positions)
    if len(masks):
        try:
            from taco.kernels.triton import token_mask

            token_mask.apply_token_mask(logits, masks, positions)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what has broken the device, the next operation says again
            triton.give_up(error)
            return NotImplemented


@op
def draw_allowed(
    logits: torch.Tensor, positions: torch.Tensor, masks: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `max_token` and `draw`, for the rows at some positions, from what `apply_token_mask` leaves of them.

    Args:
        logits: float32 [N, vocab]; not changed.
        positions: int64 [M], 0 to N - 1, in any order.
        masks: int32 [M, num_mask_words(vocab)].
        uniforms: float64 [M] in [0, 1).

    Returns:
        The largest allowed logit of each row, float32 [M], its token and the drawn one, int64 [M].
    """
    survivors = logits[positions]
    apply_token_mask(survivors, masks, torch.arange(len(masks), device=logits.device))
    return (*max_token(survivors), draw(survivors, uniforms))


@draw_allowed.candidate("native")
def _draw_allowed_native(
    logits: torch.Tensor, positions: torch.Tensor, masks: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    library = native.library()
    if library is None or logits.device.type != "cpu" or not logits.is_contiguous():
        return NotImplemented
    if not (_is_packed(logits, masks, positions) and uniforms.is_contiguous()):
        return NotImplemented
    vocab = _checked_vocab(logits, masks, positions)
    num_threads = torch.get_num_threads()
    rows = torch.empty(num_threads, vocab)
    mass = torch.empty(num_threads, vocab // SUM_CHUNK + 1, dtype=torch.float64)
    peaks = torch.empty(len(masks))
    token_ids, drawn = torch.empty(2, len(masks), dtype=torch.int64)
    library.taco_draw_allowed(
        logits.data_ptr(),
        vocab,
        positions.data_ptr(),
        masks.data_ptr(),
        masks.stride(0),
        len(masks),
        uniforms.data_ptr(),
        rows.data_ptr(),
        mass.data_ptr(),
        peaks.data_ptr(),
        token_ids.data_ptr(),
        drawn.data_ptr(),
        num_threads,
    )
    return peaks, token_ids, drawn
