"""The order of training: which tokens the model sees, and when.

The order is a pure function of (data, seed, epoch, index). Nothing is remembered between calls, so a run can be
stopped, resumed, or moved to another number of processes, and every step still sees the tokens it would have seen.

An epoch is one long stream of tokens, and the model reads windows of it. With T = seq_len:

    shards      the files of the split in a new order each epoch      [ 3 | 0 | 2 | 1 ]
    documents   inside a shard, also in a new order each epoch        [ d7 d2 d9 ... | d1 d5 ... | ... ]
    windows     window k is the tokens kT ... kT + T of that stream   |--0--|--1--|--2--| ...
    groups      about 8 neighbouring shards; the windows that start
                in one group are shuffled together                    7 2 9 0 4 ... | 31 12 25 ...

Window k holds T + 1 tokens because the model predicts tokens 1 ... T from tokens 0 ... T - 1; its last token is the
first of window k + 1. So each token of the stream is a target once an epoch, except the very first, and at most T - 1
at the very end. A window may run over the end of a document, a shard or a group; it simply reads on.

Why groups: neighbouring windows come from one shard, and files tend to differ (crawl date, source). Shuffling inside
one shard leaves that order visible in the loss; shuffling across 8 hides it, and only 8 shards' document tables are
in memory. A large file counts as several shards of about 100M tokens, cut between documents, which bounds the tables.

With document_starts, windows begin where documents do: a document of L tokens, its <|endoftext|> among them, has
max(1, L / T to the nearest whole number, halves up) windows, which begin T tokens apart from its first. A window that
reaches the document's end reads on as ever, and at the end of the epoch's stream from its beginning. So there are as
many windows in each epoch, whatever the order. Of a document a little longer than k T tokens the rest, less than half a
window, is read only by chance; where documents are shorter than T, an epoch reads tokens more than once.

Global sample g, counted from the start of the run, is window g % n_windows of epoch g // n_windows. Step s takes
samples sG ... (s + 1)G - 1 for a global batch of G (while batches grow, those after the last sample of step s - 1),
across the end of an epoch if need be, and each rank takes its own slice of those: no sample depends on how many ranks
there are. A run that has passed over data, because it diverged there, takes all later samples by so many further on.
"""

import mmap
import queue
import threading
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from ..config import RunConfig
from ..schedules import in_stages, sum_before
from .shards import Shard, ShardError, ShardSet, outside_vocabulary

# What a permutation is for. The numbers are part of the order: never change them.
SHARDS, DOCUMENTS, WINDOWS = 0, 1, 2


def permutation(n: int, seed: int, epoch: int, purpose: int, which: int) -> np.ndarray:
    """The numbers 0 ... n - 1 in an order fixed for ever by the other arguments; (n,) int64.

    NumPy freezes the bits of Philox but not `Generator.permutation`, hence the sort. Each argument is a word of
    Philox's key or counter, so no two permutations share bits.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, purpose, which], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(n)
    # Two stable sorts, by the first 16 bits and then by all 64, give what one would, in less than half the time: NumPy
    # has a radix sort for 16 bits, and its merge sort is quick where little is out of place.
    rough = np.argsort((bits >> np.uint64(48)).astype(np.uint16), kind="stable")
    return rough[np.argsort(bits[rough], kind="stable")]


@dataclass(frozen=True)
class _Part:
    """A run of documents of one file: all of it, or a share of a large one."""

    shard: Shard
    documents: slice
    n_tokens: int


def _cut(shard: Shard, part_tokens: int) -> list[_Part]:
    """The file as parts of about part_tokens, cut at the first document end past each even share."""
    # To the nearest number, not up: a file of 100M tokens ends with a whole document, a little over, and is one part.
    n_parts = (shard.n_tokens + part_tokens // 2) // part_tokens
    if n_parts <= 1:
        return [_Part(shard, slice(0, None), shard.n_tokens)] if shard.n_tokens else []
    ends = shard.document_ends()
    shares = [shard.n_tokens * i // n_parts for i in range(1, n_parts)]
    cuts = sorted({0, *(np.searchsorted(ends, shares) + 1).tolist(), len(ends)})
    tokens = [0, *(int(ends[cut - 1]) for cut in cuts[1:])]
    return [_Part(shard, slice(a, b), y - x) for (a, b), (x, y) in zip(pairwise(cuts), pairwise(tokens), strict=True)]


@dataclass(frozen=True)
class _Documents:
    """A part's documents in an epoch's order, as one run of tokens."""

    tokens: np.ndarray  # the whole shard
    ends: np.ndarray  # (documents,) where each ends in the run
    shifts: np.ndarray  # (documents,) from a position in the run to its position in the file
    windows: np.ndarray | None = None  # (documents,) windows up to each one's end, where they begin with documents

    def read(self, position: int, out: np.ndarray) -> int:
        """Copy tokens from `position` on into `out`, until it is full or the run ends; returns how many."""
        filled = 0
        document = int(self.ends.searchsorted(position, side="right"))
        while filled < len(out) and document < len(self.ends):
            n = min(len(out) - filled, int(self.ends[document]) - position)
            source = position + int(self.shifts[document])
            if self.tokens.itemsize <= out.itemsize:
                out[filled : filled + n] = self.tokens[source : source + n]
            else:  # what is too large for the type must stay too large for the vocabulary
                most = np.iinfo(out.dtype).max
                np.minimum(self.tokens[source : source + n], most, out=out[filled : filled + n], casting="unsafe")
            filled, position, document = filled + n, position + n, document + 1
        return filled

    def window_start(self, window: int, seq_len: int) -> int:
        """The position at which a window of the run begins, counted from its first document's first."""
        assert self.windows is not None
        document = int(self.windows.searchsorted(window, side="right"))
        if not document:
            return window * seq_len
        return int(self.ends[document - 1]) + (window - int(self.windows[document - 1])) * seq_len


@dataclass(frozen=True)
class _Epoch:
    """Where an epoch's parts and groups begin."""

    parts: list[int]  # in this epoch's order
    starts: list[int]  # token at which each of `parts` starts; with document_starts, window
    windows: list[int]  # first window of each group, and n_windows at the end


class TokenStream:
    """Random access to the windows of a split, in the order of training (see the top of this file).

    `shuffle=False` keeps documents and windows as they are stored, for validation. Objects share nothing: use one a
    thread. `document_starts` needs to know where all documents end: of files without an index, it reads every token.
    Raises ShardError when the split is too short for one window.

    Attributes:
        tokenizer: that the tokens are of.
        dtype: of the windows, uint16 or uint32.
        n_windows: of an epoch.
        tokens_an_epoch: as many as are read in one.
    """

    part_tokens = 100_000_000  # both are part of the order: a run must resume with the values it began with
    group_size = 8

    def __init__(self, shards: ShardSet, seq_len: int, seed: int, shuffle: bool = True, document_starts: bool = False):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: choose one from 0 to 2**64 - 1")
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}: choose at least 1")
        self.seq_len, self.seed, self.shuffle, self.vocab_size = seq_len, seed, shuffle, shards.vocab_size
        self.tokenizer = shards.tokenizer
        # Of all numbers of this type the largest is no token.
        self.dtype = np.dtype(np.uint16 if shards.vocab_size < 2**16 else np.uint32)
        self.n_windows = (shards.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ShardError(
                f"split '{shards.split}' has {shards.n_tokens:,} tokens, one window needs seq_len + 1 = "
                f"{seq_len + 1:,}: prepare more data or lower seq_len"
            )
        self._parts = [part for shard in shards.shards for part in _cut(shard, self.part_tokens)]
        self.tokens_an_epoch = shards.n_tokens
        self._document_starts = document_starts
        self._sizes = [part.n_tokens for part in self._parts]
        if document_starts:
            self._sizes = [int(self._count(self._document_lengths(part)).sum()) for part in self._parts]
            self.n_windows = sum(self._sizes)
            self.tokens_an_epoch = self.n_windows * seq_len
        n_parts = len(self._parts)
        n_groups = max(1, (n_parts + self.group_size // 2) // self.group_size)
        self._groups = list(pairwise(n_parts * i // n_groups for i in range(n_groups + 1)))

        # Whole groups stay in memory, and the first part of the next, into which a group's last window may read.
        largest = max(stop - start for start, stop in self._groups)
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        # A file that is cut short while it is mapped would end the process without a word when it is read.
        self._mapped: deque[tuple[Shard, weakref.ref[mmap.mmap]]] = deque(maxlen=largest + 1)
        self._documents = lru_cache(maxsize=largest + 1)(self._order_documents)
        self._windows = lru_cache(maxsize=2)(self._order_windows)
        self._fetch_ahead = lru_cache(maxsize=3)(self._announce)

    def window(self, epoch: int, index: int) -> np.ndarray:
        """Window `index` of an epoch, both from 0; (T + 1,) of `dtype`. Raises ShardError for a token that is none."""
        if epoch < 0 or not 0 <= index < self.n_windows:
            raise IndexError(f"no window {index} in epoch {epoch}: an epoch has windows 0 to {self.n_windows - 1}")
        return self.batch(epoch * self.n_windows + index, 1)[0]

    def batch(self, start_sample: int, n: int) -> np.ndarray:
        """Samples start_sample ... start_sample + n - 1 of the run; (n, T + 1) of `dtype`. Errors as for `window`."""
        if start_sample < 0:
            raise IndexError(f"no sample {start_sample}: samples are counted from 0")
        out = np.empty((n, self.seq_len + 1), self.dtype)
        for shard, mapped in self._mapped:
            if (memory := mapped()) is not None and memory.size() < len(memory):
                raise ShardError(f"{shard.path} was cut short while it was read: copy it again, then start again")
        for row in range(n):
            self._read_window(*divmod(start_sample + row, self.n_windows), out[row])
        if n and out.max() >= self.vocab_size:
            row = int((out >= self.vocab_size).any(axis=1).argmax())
            self._read_window(*divmod(start_sample + row, self.n_windows), out[row], check=True)
        return out

    def _read_window(self, epoch: int, index: int, out: np.ndarray, check: bool = False) -> None:
        layout = self._epoch(epoch)
        group = bisect_right(layout.windows, index) - 1
        first = layout.windows[group]
        window = first + int(self._windows(epoch, group)[index - first])
        position = window if self._document_starts else window * self.seq_len
        part = bisect_right(layout.starts, position) - 1
        position -= layout.starts[part]
        if self._document_starts:
            position = self._documents(epoch, layout.parts[part]).window_start(position, self.seq_len)
        filled = 0
        while filled < len(out):
            n = self._documents(epoch, layout.parts[part]).read(position, out[filled:])
            if check and (largest := int(out[filled : filled + n].max())) >= self.vocab_size:
                raise outside_vocabulary(self._parts[layout.parts[part]].shard, largest, self.vocab_size)
            filled, position, part = filled + n, 0, (part + 1) % len(layout.parts)

    def _permutation(self, n: int, epoch: int, purpose: int, which: int) -> np.ndarray:
        return permutation(n, self.seed, epoch, purpose, which) if self.shuffle else np.arange(n)

    def _lay_out(self, epoch: int) -> _Epoch:
        parts = self._permutation(len(self._parts), epoch, SHARDS, 0).tolist()
        starts = [0, *np.cumsum([self._sizes[part] for part in parts]).tolist()]
        # The first window of a group is the first that starts at or after the group's first token.
        unit = 1 if self._document_starts else self.seq_len
        windows = [min(-(-starts[first] // unit), self.n_windows) for first, _ in self._groups]
        return _Epoch(parts, starts[:-1], [*windows, self.n_windows])

    def _order_windows(self, epoch: int, group: int) -> np.ndarray:
        # A group's windows are put in order when it is entered, and that is when the next group's files are asked for.
        self._fetch_ahead(epoch, group)
        self._fetch_ahead(*((epoch, group + 1) if group + 1 < len(self._groups) else (epoch + 1, 0)))
        first, stop = self._epoch(epoch).windows[group : group + 2]
        return self._permutation(stop - first, epoch, WINDOWS, group)

    def _announce(self, epoch: int, group: int) -> None:
        parts = self._epoch(epoch).parts[slice(*self._groups[group])]
        for shard in {id(shard): shard for shard in (self._parts[part].shard for part in parts)}.values():
            shard.fetch_ahead()

    def _document_lengths(self, part: _Part) -> np.ndarray:
        shard, documents = part.shard, part.documents
        ends = shard.document_ends()
        start = int(ends[documents.start - 1]) if documents.start else 0
        lengths = np.diff(ends[documents], prepend=start)
        if (lengths <= 0).any():
            raise ShardError(f"{shard.path}: the document ends in its index do not increase: prepare the data again")
        return lengths

    def _count(self, lengths: np.ndarray) -> np.ndarray:
        """Windows that begin in documents of these lengths, with document_starts."""
        return np.maximum(1, (lengths + self.seq_len // 2) // self.seq_len)

    def _order_documents(self, epoch: int, part: int) -> _Documents:
        shard, lengths = self._parts[part].shard, self._document_lengths(self._parts[part])
        ends = shard.document_ends()[self._parts[part].documents]
        order = self._permutation(len(ends), epoch, DOCUMENTS, part)
        new_ends = np.cumsum(lengths[order])
        tokens = shard.tokens()
        base: Any = tokens
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap):
            self._mapped.append((shard, weakref.ref(base)))
        windows = np.cumsum(self._count(lengths[order])) if self._document_starts else None
        return _Documents(tokens, new_ends, ends[order] - new_ends, windows)


def training_stream(config: RunConfig, shards: ShardSet) -> TokenStream:
    """The windows that a run trains on."""
    return TokenStream(shards, config.data.seq_len, config.train.seed, document_starts=config.data.document_starts)


def cut(windows: torch.Tensor, length: int) -> torch.Tensor:
    """Windows in pieces of ``length`` tokens and a label more, (B, T + 1) -> (B T / length, length + 1).

    Neighbours share a token, the last label of one and the first input of the next, as windows do: each token is a
    target as often as before. ``length`` must divide T.
    """
    return windows.unfold(1, length + 1, length).flatten(0, 1)


class StepLoader(Iterator[torch.Tensor]):
    """The batches of one rank for the steps start_step ... stop_step - 1, read ahead by a thread.

    Each item is one step: (grad_accum_steps, B, T + 1) int64, where B is micro_batch_size: the rank's contiguous slice
    of the step's samples. Batch sizes are in samples: each of batch_ramp for batch_ramp_steps, then global_batch_size.
    Sample k of a step is number data_offset + k of the stream, and as many more as the steps before it have together.
    pin_memory needs CUDA and pins for fast copies.

    An error in the thread is raised by the next step asked for. Use it as a context manager, or call close():

        with StepLoader(stream, 0, 1000, global_batch_size=512, micro_batch_size=64) as steps:
            for batch in steps: ...
    """

    def __init__(
        self,
        stream: TokenStream,
        start_step: int,
        stop_step: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        batch_ramp: Sequence[int] = (),
        batch_ramp_steps: int = 0,
        data_offset: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        prefetch: int = 4,
    ):
        if min(global_batch_size, micro_batch_size, world_size, prefetch) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size}, micro_batch_size {micro_batch_size}, prefetch {prefetch}, "
                f"rank {rank} of {world_size}: sizes start at 1, ranks at 0"
            )
        stages = (batch_ramp, batch_ramp_steps, global_batch_size)
        if odd := [size for size in (*batch_ramp, global_batch_size) if size % (micro_batch_size * world_size)]:
            raise ValueError(
                f"global_batch_size {odd[0]} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"world_size {world_size} = {micro_batch_size * world_size}: change one of them"
            )
        device = torch.cuda.current_device() if pin_memory else None

        def read(step: int) -> torch.Tensor:
            rank_batch_size = in_stages(step, *stages) // world_size
            first = data_offset + sum_before(step, *stages) + rank * rank_batch_size
            batch = torch.from_numpy(stream.batch(first, rank_batch_size).astype(np.int64))
            batch = batch.view(-1, micro_batch_size, stream.seq_len + 1)
            if device is None:
                return batch
            with torch.cuda.device(device):  # CUDA's current device is per thread: else every rank would use GPU 0
                return batch.pin_memory()

        self._todo = stop_step - start_step
        self._ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(maxsize=prefetch)
        stop = threading.Event()

        # The thread must not hold `self`: then a forgotten loader is collected, and its thread with it.
        def read_ahead(ready: queue.Queue[torch.Tensor | BaseException] = self._ready) -> None:
            try:
                for step in range(start_step, stop_step):
                    batch = read(step)
                    if stop.is_set():
                        return
                    ready.put(batch)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=read_ahead, name="StepLoader", daemon=True)
        self._close = weakref.finalize(self, _stop_thread, thread, stop, self._ready)  # also runs at interpreter exit
        thread.start()

    def __next__(self) -> torch.Tensor:
        if self._todo <= 0 or not self._close.alive:
            self.close()
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._todo -= 1
        return item

    def close(self) -> None:
        """End the thread; harmless when repeated."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _stop_thread(thread: threading.Thread, stop: threading.Event, ready: queue.Queue) -> None:
    stop.set()
    deadline = time.monotonic() + 2  # it may be waiting for a storage that does not answer; it is a daemon
    while thread.is_alive() and thread is not threading.current_thread() and time.monotonic() < deadline:
        with ready.mutex:  # make room, so that a thread waiting to put sees `stop`
            ready.queue.clear()
            ready.not_full.notify_all()
        thread.join(timeout=0.01)
