"""Keeping the documents of a packed window apart: positions start again, and attention stops, with each document.

A window is cut from a stream of documents, so it may begin inside one and hold several. By default the model reads it
as one text. With `data.document_mask` each token sees only its own document, as if that stood alone:

    tokens      w  w  w  E  a  a  E  b      E is <|endoftext|>, closing a document (our shards)
    positions   0  1  2  3  0  1  2  0
    a sees                  a  a

    tokens      w  w  w  E  a  a  E  b      E opening a document (shards of llm.c and build-nanogpt)
    positions   0  1  2  0  1  2  0  1

Every position keeps its label. The one whose label lies in the next document (a closing E, or the last token before an
opening one) is where the model learns how documents begin, or that they end; without it, it could not start a text
after <|endoftext|>, or stop. So a loss has as many terms with the mask as without.

Shapes in comments: B rows, T positions, N blocks of 128 positions, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # FlexAttention's own


def document_starts(input_ids: Tensor, eot: int, eot_first: bool) -> Tensor:
    """Where a document, or the rest of one, begins: (B, T) bool, true in the first column.

    Args:
        input_ids: (B, T), on any device; nothing here waits for it.
        eot: the token that separates documents.
        eot_first: whether that token begins a document; else it ends one.
    """
    is_eot = input_ids == eot
    return F.pad(is_eot[:, 1:] if eot_first else is_eot[:, :-1], (1, 0), value=True)


def document_positions(input_ids: Tensor, eot: int, eot_first: bool) -> Tensor:
    """Position ids, (B, T) int64: each token's distance from the first token of its document in this row."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    document = document_starts(input_ids, eot, eot_first).cumsum(-1)  # (B, T), its number: never falls
    return places - torch.searchsorted(document, document)  # where that number begins


def dense_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention's scores, (B, 1, T, T): 0 from a document's start up to the token itself, else -inf."""
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    first = (places - position_ids)[:, None, :, None]  # (B, 1, T, 1), where the query's document starts
    seen = (places >= first) & (places <= places[:, None])
    return torch.zeros((), dtype=dtype, device=seen.device).where(seen, -torch.inf)


def block_mask(position_ids: Tensor) -> BlockMask:
    """The same for FlexAttention, from the blocks' corners: no (T, T) tensor is made."""
    n_rows, length = position_ids.shape
    places = torch.arange(length, device=position_ids.device)
    first = places - position_ids  # (B, T), never falls within a row

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (kv >= first[b, q])

    begins = places[::BLOCK]  # (N,)
    ends = (begins + BLOCK - 1).clamp(max=length - 1)
    earlier = begins < begins[:, None]  # (N, N), query blocks down, key blocks across
    reached = earlier & (first[:, begins, None] <= ends)  # (B, N, N), by the block's first query, which sees furthest
    # By all queries, all keys. A last block that is cut short counts as partial, as in create_block_mask.
    full = earlier & (first[:, ends, None] <= begins) & (begins + BLOCK <= length)[:, None]
    partial = (reached | (begins == begins[:, None])) & ~full

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:  # how many in each line, and which, those first
        blocks = blocks[:, None].int()  # (B, 1, N, N)
        return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def cumulative_lengths(position_ids: Tensor, n_documents: int) -> Tensor:
    """Where each document starts in the rows laid end to end, then the end of all: (D + 1,) int32 for FlashAttention.

    D is ``n_documents`` rounded up, the rest being empty documents at the end: compiled blocks then meet few shapes.
    """
    rows = position_ids.shape[0]
    size = max(16, 4 * rows, 1 << (n_documents - 1).bit_length())
    starts = (position_ids == 0).flatten()
    return torch.nonzero_static(starts, size=size + 1, fill_value=starts.numel())[:, 0].int()


@dataclass(frozen=True)
class DocumentMask:
    """From packed tokens to the keywords with which GPTForCausalLM keeps their documents apart.

    Attributes:
        eot, eot_first: as in `document_starts`.
        attention: the model's backend: eager, sdpa, flex_attention, or a flash_attention.
        dtype: of what the model computes in, under autocast that of autocast.
    """

    eot: int
    eot_first: bool
    attention: str
    dtype: torch.dtype = torch.float32

    def __call__(self, input_ids: Tensor, on_host: Tensor | None = None) -> dict[str, Any]:
        """Keywords for a forward pass over ``input_ids``, (B, T); of the same types and shapes for any batch.

        Args:
            on_host: the same tokens in host memory. FlashAttention needs their documents counted; this saves waiting
                for the device.
        """
        position_ids = document_positions(input_ids, self.eot, self.eot_first)
        if self.attention.startswith("flash_attention"):
            starts = document_starts(input_ids if on_host is None else on_host, self.eot, self.eot_first)
            lengths = cumulative_lengths(position_ids, int(starts.sum()))
            told: dict[str, Any] = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            # No document is longer than its row. The exact length would cost a wait, and a graph for each.
            told |= dict.fromkeys(("max_length_q", "max_length_k"), input_ids.shape[1])
        elif self.attention == "flex_attention":
            told = {"attention_mask": block_mask(position_ids)}
        else:
            # Each layer of sdpa would convert another dtype. Eager adds up scores in float32, as without documents.
            dtype = self.dtype if self.attention == "sdpa" else torch.promote_types(self.dtype, torch.float32)
            told = {"attention_mask": dense_mask(position_ids, dtype)}
        return {"position_ids": position_ids, **told}
