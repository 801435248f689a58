import gc
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from gpt2_hf.data.shards import ShardError, open_split
from gpt2_hf.data.stream import DOCUMENTS, SHARDS, WINDOWS, StepLoader, TokenStream, permutation

EOT = 50256
T = 8
ADVICE = "the order of training changed: every unfinished run would resume on other data. Put the old order back."


# What test_golden_order holds.
GOLDEN_SHARDS = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
GOLDEN_DOCUMENTS = [4, 2, 9, 6, 5, 1, 7, 3, 8, 0]
GOLDEN_WINDOWS = [0, 3, 7, 8, 5, 2, 6, 9, 4, 1]
GOLDEN_STREAM = [
    [50256, 300, 301, 50256, 20, 21],
    [10, 11, 50256, 110, 111, 50256],
    [21, 50256, 0, 1, 50256, 10],
    [320, 321, 50256, 310, 311, 50256],
    [121, 50256, 210, 211, 50256, 220],
    [50256, 100, 101, 50256, 120, 121],
    [220, 221, 50256, 200, 201, 50256],
]


def make_documents(n_shards, documents_a_shard, longest=30):
    """Shards of documents in which every token is unique."""
    lengths = np.random.default_rng(0).integers(1, longest, (n_shards, documents_a_shard))
    token = iter(range(EOT))
    return [[[next(token) for _ in range(n)] for n in row] for row in lengths.tolist()]


def reference_epoch(parts, seed, epoch, group_size, seq_len=T):
    """All windows of an epoch in the order of training, the plain way: the whole stream in a list."""

    def shuffled(items, purpose, which):
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, purpose, which], np.uint64)
        bits = np.random.Philox(key=key, counter=counter).random_raw(len(items)).tolist()
        return [item for _, item in sorted(zip(bits, items, strict=True), key=lambda pair: pair[0])]

    stream, part_starts = [], []
    for part in shuffled(range(len(parts)), SHARDS, 0):
        part_starts.append(len(stream))
        for document in shuffled(parts[part], DOCUMENTS, part):
            stream += [*document, EOT]
    n_groups = max(1, (len(parts) + group_size // 2) // group_size)
    bounds = [len(parts) * i // n_groups for i in range(n_groups)]
    group_starts = [*(part_starts[first] for first in bounds), len(stream)]
    starts = [k * seq_len for k in range((len(stream) - 1) // seq_len)]
    windows = []
    for group, (a, b) in enumerate(pairwise(group_starts)):
        for start in shuffled([s for s in starts if a <= s < b], WINDOWS, group):
            windows.append(stream[start : start + seq_len + 1])
    return windows, stream


def epoch_of(stream, epoch):
    return [stream.window(epoch, index).tolist() for index in range(stream.n_windows)]


def small_stream(cls=TokenStream, **attributes):
    return type("Small", (cls,), attributes)


@pytest.fixture
def shards(make_shards):
    """5 shards of 40 documents, about 3,000 tokens."""
    return open_split(make_shards({"train": make_documents(5, 40)}), "train")


def reference_document_starts(parts, seed, epoch, group_size, seq_len):
    """The windows of an epoch that begin with documents, the plain way: the whole stream in a list, twice over."""

    def shuffled(items, purpose, which):
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, purpose, which], np.uint64)
        bits = np.random.Philox(key=key, counter=counter).random_raw(len(items)).tolist()
        return [item for _, item in sorted(zip(bits, items, strict=True), key=lambda pair: pair[0])]

    stream, starts_of_parts = [], []
    for part in shuffled(range(len(parts)), SHARDS, 0):
        starts_of_parts.append([])
        for document in shuffled(parts[part], DOCUMENTS, part):
            n = max(1, math.floor(Fraction(len(document) + 1, seq_len) + Fraction(1, 2)))
            starts_of_parts[-1] += [len(stream) + k * seq_len for k in range(n)]
            stream += [*document, EOT]
    n_groups = max(1, (len(parts) + group_size // 2) // group_size)
    windows = []
    for group in range(n_groups):
        first, last = len(parts) * group // n_groups, len(parts) * (group + 1) // n_groups
        starts = [start for part in starts_of_parts[first:last] for start in part]
        windows += [(2 * stream)[start : start + seq_len + 1] for start in shuffled(starts, WINDOWS, group)]
    return windows


@pytest.mark.parametrize("group_size", [1, 2, 3, 8])
@pytest.mark.parametrize("epoch", [0, 3])
def test_order_equals_the_plain_reference(shards, group_size, epoch):
    stream = small_stream(group_size=group_size)(shards, T, seed=7)
    windows, _ = reference_epoch(make_documents(5, 40), 7, epoch, group_size)
    assert epoch_of(stream, epoch) == windows


@pytest.mark.parametrize(("group_size", "seq_len"), [(1, 8), (2, 1), (3, 7), (8, 8), (8, 20), (2, 64)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_windows_at_document_starts_equal_the_plain_reference(shards, group_size, seq_len, epoch):
    stream = small_stream(group_size=group_size)(shards, seq_len, seed=7, document_starts=True)
    windows = reference_document_starts(make_documents(5, 40), 7, epoch, group_size, seq_len)
    assert epoch_of(stream, epoch) == windows
    assert stream.tokens_an_epoch == len(windows) * seq_len


def test_document_starts_in_cut_files_and_over_the_end_of_an_epoch(make_shards):
    documents = [list(range(500)), list(range(600, 620)), list(range(1000, 1101)), [7]]
    shards = open_split(make_shards({"train": [documents]}), "train")
    stream = small_stream(part_tokens=50, group_size=2)(shards, 64, seed=1, document_starts=True)
    parts = [documents[:1], documents[1:3], documents[3:]]
    expected = [reference_document_starts(parts, 1, epoch, 2, 64) for epoch in (0, 1)]
    assert [len(windows) for windows in expected] == [8 + 1 + 2 + 1] * 2 == [stream.n_windows] * 2
    assert stream.batch(5, 14).tolist() == [*expected[0], *expected[1]][5:19]


def test_documents_that_fill_windows_are_each_read_once(make_shards):
    """Where lengths are whole windows, all but the order is as without the switch; and unshuffled, that too."""
    documents = [[list(range(100 * k, 100 * k + T * (1 + k % 3) - 1)) for k in range(20)]]
    shards = open_split(make_shards({"train": documents}), "train")
    starts = TokenStream(shards, T, seed=0, shuffle=False, document_starts=True)
    plain = TokenStream(shards, T, seed=0, shuffle=False)
    assert starts.n_windows == plain.n_windows + 1  # the last, whose label is the first token again
    assert epoch_of(starts, 0)[:-1] == epoch_of(plain, 0)
    assert epoch_of(starts, 0)[-1][-1] == 0


def test_groups_shorter_than_a_window(make_shards):
    documents = [[[10 * shard + i] for i in range(3)] for shard in range(12)]
    shards = open_split(make_shards({"train": documents}), "train")
    stream = small_stream(group_size=1)(shards, 16, seed=0)
    windows, _ = reference_epoch(documents, 0, 0, group_size=1, seq_len=16)
    assert epoch_of(stream, 0) == windows and len(windows) == 4


def test_every_token_is_seen_once_an_epoch(shards):
    for epoch in range(2):
        seen = Counter(token for window in epoch_of(TokenStream(shards, T, seed=1), epoch) for token in window[:-1])
        n_eot = seen.pop(EOT)
        assert set(seen.values()) == {1}
        # Inputs are whole windows: the rest of the last one, at most T tokens, is all that may be missing.
        assert shards.n_tokens - T <= len(seen) + n_eot <= shards.n_tokens


def test_unshuffled_is_the_stored_order(shards):
    tokens = np.concatenate([shard.tokens() for shard in shards.shards]).tolist()
    for cls in (TokenStream, small_stream(part_tokens=100, group_size=2)):
        stream = cls(shards, T, seed=0, shuffle=False)
        expected = [tokens[k * T : k * T + T + 1] for k in range(stream.n_windows)]
        assert epoch_of(stream, 0) == epoch_of(stream, 1) == expected


def test_order_depends_on_seed_and_epoch_only(shards):
    first = epoch_of(TokenStream(shards, T, seed=1), 0)
    stream = TokenStream(shards, T, seed=1)
    stream.window(5, 3)
    assert epoch_of(stream, 0) == first
    assert epoch_of(stream, 1) != first
    assert epoch_of(TokenStream(shards, T, seed=2), 0) != first
    # Not the same windows in another order: the documents meet other neighbours.
    assert len({tuple(w) for w in first} & {tuple(w) for w in epoch_of(stream, 1)}) < len(first) / 4


def test_large_files_count_as_several_shards(make_shards):
    documents = make_documents(2, 100)
    shards = open_split(make_shards({"train": [*documents, [[1, 2]]]}), "train")
    limit = 300
    parts = []
    for shard in [*documents, [[1, 2]]]:
        n_tokens = sum(len(document) + 1 for document in shard)
        n_parts = max(1, round(n_tokens / limit))
        parts.append([])
        done, share = 0, 1
        for document in shard:
            parts[-1].append(document)
            done += len(document) + 1
            if share < n_parts and done >= n_tokens * share // n_parts:
                parts.append([])
                share += 1
    assert len(parts) > 8
    stream = small_stream(part_tokens=limit, group_size=3)(shards, T, seed=3)
    for epoch in range(2):
        assert epoch_of(stream, epoch) == reference_epoch(parts, 3, epoch, group_size=3)[0]


@pytest.mark.parametrize(("part_tokens", "n_parts"), [(1000, 1), (100, 1), (80, 1), (60, 2), (50, 2), (10, 10)])
def test_a_file_a_little_over_the_size_of_a_part_stays_whole(make_shards, part_tokens, n_parts):
    shards = open_split(make_shards({"train": [[[1]] * 51]}), "train")  # 102 tokens
    stream = small_stream(part_tokens=part_tokens)(shards, T, seed=0)
    assert len(stream._parts) == n_parts
    assert sum(part.n_tokens for part in stream._parts) == 102


def test_a_document_longer_than_a_part_is_not_cut(make_shards):
    documents = [list(range(500)), list(range(600, 620)), list(range(1000, 1100))]
    shards = open_split(make_shards({"train": [documents]}), "train")
    stream = small_stream(part_tokens=50)(shards, T, seed=0)
    windows, _ = reference_epoch([documents[:1], documents[1:2], documents[2:]], 0, 0, group_size=8)
    assert epoch_of(stream, 0) == windows


def test_batches_span_epochs(shards):
    stream = TokenStream(shards, T, seed=4)
    W = stream.n_windows
    batch = stream.batch(W - 3, 6)
    assert batch.dtype == np.uint16 and batch.shape == (6, T + 1)
    expected = [stream.window(0, W - 3 + i) for i in range(3)] + [stream.window(1, i) for i in range(3)]
    assert (batch == np.stack(expected)).all()


def test_golden_order(make_shards):
    """Hard-coded: these numbers must never change."""
    assert permutation(10, 0, 0, SHARDS, 0).tolist() == GOLDEN_SHARDS, ADVICE
    assert permutation(10, 1337, 2, DOCUMENTS, 5).tolist() == GOLDEN_DOCUMENTS, ADVICE
    assert permutation(10, 2**64 - 1, 2, WINDOWS, 5).tolist() == GOLDEN_WINDOWS, ADVICE
    documents = [[[100 * shard + 10 * i, 100 * shard + 10 * i + 1] for i in range(3)] for shard in range(4)]
    stream = small_stream(group_size=2)(open_split(make_shards({"train": documents}), "train"), 5, seed=1337)
    assert epoch_of(stream, 1) == GOLDEN_STREAM, ADVICE
    assert (TokenStream.part_tokens, TokenStream.group_size) == (100_000_000, 8), ADVICE


@pytest.mark.parametrize("n", [0, 1, 1000, 100_000])
def test_a_permutation_sorts_the_bits(n):
    key, counter = np.array([3, 4], np.uint64), np.array([0, 0, WINDOWS, 5], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(n).tolist()
    assert permutation(n, 3, 4, WINDOWS, 5).tolist() == sorted(range(n), key=bits.__getitem__), ADVICE


def test_equal_bits_stay_in_their_order(monkeypatch):
    """64 bits are hardly ever equal, so here are some that are, or differ in few places."""
    bits = np.random.default_rng(0).choice(np.array([0, 1, 2**47, 2**48, 2**63, 2**64 - 1], np.uint64), 5000)
    monkeypatch.setattr(np.random, "Philox", lambda **_: type("Fixed", (), {"random_raw": lambda self, n: bits})())
    assert permutation(5000, 0, 0, 0, 0).tolist() == sorted(range(5000), key=bits.tolist().__getitem__)


def test_bad_arguments_are_refused_in_one_line(shards, make_shards):
    with pytest.raises(ShardError, match=r"has 4 tokens, one window needs seq_len \+ 1 = 9"):
        TokenStream(open_split(make_shards({"val": [[[1, 2, 3]]]}, "short"), "val"), T, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        TokenStream(shards, T, seed=-1)
    with pytest.raises(ValueError, match="seq_len is 0"):
        TokenStream(shards, 0, seed=0)
    stream = TokenStream(shards, T, seed=0)
    for epoch, index in ((-1, 0), (0, -1), (0, stream.n_windows)):
        with pytest.raises(IndexError, match=f"no window {index} in epoch {epoch}"):
            stream.window(epoch, index)
    with pytest.raises(IndexError, match="no sample -1"):
        stream.batch(-1, 2)


def test_an_unordered_index_is_refused_when_read(make_shards):
    root = make_shards({"train": [[[1, 2], [3], [4, 5]]]})
    (root / "train/00000.ds.index").write_bytes(np.array([5, 3, 8], dtype="<u8").tobytes())
    stream = TokenStream(open_split(root, "train"), 4, seed=0)
    with pytest.raises(ShardError, match="do not increase"):
        stream.window(0, 0)


def test_memory_is_bounded_by_a_group(shards):
    stream = small_stream(group_size=1)(shards, T, seed=0)
    for epoch in range(3):
        epoch_of(stream, epoch)
    assert stream._documents.cache_info().currsize <= 2
    assert stream._documents.cache_info().misses <= 3 * 5 + 2  # each part is ordered once an epoch, not once a window


# StepLoader


def loader(stream, start=0, stop=4, global_batch_size=16, micro_batch_size=2, **options):
    return StepLoader(
        stream, start, stop, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, **options
    )


def steps_of(stream, *args, **options):
    with loader(stream, *args, **options) as steps:
        return list(steps)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (2, 1), (8, 2)])
def test_global_batches_are_the_same_on_any_topology(shards, world_size, micro_batch_size):
    n_steps = 3 * TokenStream(shards, T, seed=0).n_windows // 16 // 2  # one and a half epochs
    ranks = [
        steps_of(
            TokenStream(shards, T, seed=0),
            stop=n_steps,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    stream = TokenStream(shards, T, seed=0)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert batches[0].dtype == torch.int64
        assert batches[0].shape == (16 // world_size // micro_batch_size, micro_batch_size, T + 1)
        joined = torch.cat([batch.view(-1, T + 1) for batch in batches])
        assert (joined.numpy() == stream.batch(step * 16, 16)).all()


def test_restart_is_the_tail_of_a_straight_run(shards):
    straight = steps_of(TokenStream(shards, T, seed=0), stop=40)
    for start in (1, 17, 39):
        resumed = steps_of(TokenStream(shards, T, seed=0), start=start, stop=40)
        assert torch.equal(torch.stack(resumed), torch.stack(straight[start:]))


def test_sizes_that_do_not_divide_are_refused(shards):
    stream = TokenStream(shards, T, seed=0)
    with pytest.raises(ValueError, match=r"global_batch_size 16 .* micro_batch_size 3 x world_size 2 = 6"):
        loader(stream, micro_batch_size=3, world_size=2)
    for options in ({"rank": 2, "world_size": 2}, {"micro_batch_size": 0}, {"prefetch": 0}):
        with pytest.raises(ValueError, match="sizes start at 1"):
            loader(stream, **options)


def test_no_steps_is_an_empty_loader(shards):
    assert steps_of(TokenStream(shards, T, seed=0), start=4, stop=4) == []


class Failing(TokenStream):
    def batch(self, start_sample, n):
        if start_sample >= 32:
            raise OSError("disk went away")
        return super().batch(start_sample, n)


def test_an_error_in_the_thread_reaches_the_consumer(shards):
    steps = loader(Failing(shards, T, seed=0), stop=10)
    next(steps), next(steps)
    with pytest.raises(OSError, match="disk went away"):
        next(steps)
    assert n_threads() == 0
    assert list(steps) == []


def n_threads():
    return sum(thread.name == "StepLoader" for thread in threading.enumerate())


def test_reading_ahead_is_bounded(shards):
    read = []

    class Counting(TokenStream):
        def batch(self, start_sample, n):
            read.append(start_sample)
            return super().batch(start_sample, n)

    with loader(Counting(shards, T, seed=0), stop=1000, prefetch=3) as steps:
        next(steps)
        deadline = time.monotonic() + 5
        while len(read) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 5  # one consumed, three waiting, one in the thread's hand


@pytest.mark.parametrize("wait", [0, 0.05], ids=["at once", "queue full"])
def test_closing_ends_the_thread(shards, wait):
    steps = loader(TokenStream(shards, T, seed=0), stop=10**9)
    next(steps)
    time.sleep(wait)
    steps.close()
    steps.close()
    assert n_threads() == 0
    assert list(steps) == []


def test_the_thread_ends_with_the_work_and_with_the_loader(shards):
    steps = loader(TokenStream(shards, T, seed=0), stop=10**9)
    next(steps)
    assert n_threads() == 1
    del steps
    gc.collect()
    assert n_threads() == 0
    with pytest.raises(KeyError), loader(TokenStream(shards, T, seed=0), stop=10**9) as steps:
        next(steps)
        raise KeyError
    assert n_threads() == 0


def test_an_unclosed_loader_does_not_hang_the_exit(make_shards):
    root = make_shards({"train": make_documents(1, 40)})
    code = (
        "from gpt2_hf.data.shards import open_split; from gpt2_hf.data.stream import StepLoader, TokenStream\n"
        f"stream = TokenStream(open_split({str(root)!r}, 'train'), 8, seed=0)\n"
        "steps = StepLoader(stream, 0, 10**9, global_batch_size=8, micro_batch_size=2)\n"
        "print(next(steps).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == "torch.Size([4, 2, 9])"


def test_training_and_validation_streams_run_side_by_side(shards):
    alone = steps_of(TokenStream(shards, T, seed=0), stop=100)
    validation = TokenStream(shards, T, seed=0, shuffle=False)
    expected = epoch_of(validation, 0)
    with loader(TokenStream(shards, T, seed=0), stop=100) as steps:
        for batch, same in zip(steps, alone, strict=True):
            assert torch.equal(batch, same)
            assert validation.batch(0, 20).tolist() == expected[:20]
