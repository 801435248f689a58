"""What inspection.py found, as text of at most 100 columns for a terminal, and the lengths as a picture."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .copies import NEAR, Repeats
from .inspection import EDGES, FirstBatch, Inspection, SplitFigures

WIDTH, QUOTED_LINES = 100, 20
COLORS = ("#2563a8", "#c4541a", "#3f8f4f")


def _lines(text: str, indent: str) -> list[str]:
    """Text as lines of at most WIDTH columns, without control characters, which could upset a terminal."""
    lines = []
    for line in text.split("\n"):
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        while True:
            columns = np.cumsum([2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line])
            fits = int(np.searchsorted(columns, WIDTH - len(indent), side="right"))
            if fits < len(line) and (space := line.rfind(" ", fits // 2, fits + 1)) > 0:
                fits = space
            lines.append((indent + line[:fits]).rstrip())
            line = line[fits:].removeprefix(" ")
            if not line:
                break
    return lines


def _quote(text: str) -> list[str]:
    lines = _lines(text, "  | ")
    return lines if len(lines) <= QUOTED_LINES else [*lines[:QUOTED_LINES], "  | [...]"]


def render(inspection: Inspection) -> str:
    """All of it as text of at most 100 columns."""
    splits = inspection.splits
    lines = [inspection.path]
    for name, fact in inspection.facts.items():
        first, *more = _lines(fact, " " * 17)
        lines += [f"  {name:<15}{first.strip()}", *more]
    lines += ["", " " * 38 + "".join(f"{figures.split:>28}" for figures in splits)]
    for label, show in _ROWS:
        lines.append(f"{label:<38}" + "".join(f"{show(figures):>28}" for figures in splits))
    if leaked := inspection.val_in_train:
        lines.append(f"{'documents of val read in train as well':<38}{leaked.repeats:>{28 * len(splits)},}")
    lines += ["", *_histogram(splits), "", "most frequent tokens"]
    for figures in splits:
        shares = "  ".join(f"{text!r} {share:.1%}" for text, share in figures.frequent)
        lines += _lines(f"{figures.split}: {shares}", "  ")
    for title, remarks in (("sampling", _sampling(splits)), ("LOOK AT THIS", _alarms(inspection))):
        if remarks:
            lines += ["", title, *(line for remark in remarks for line in _lines(remark, "  "))]
    for figures in splits:
        if figures.exact.most:
            lines += ["", f"{figures.split}: the document that was read {figures.exact.most:,} times"]
            lines += _quote(figures.exact.example)
        for excerpt in figures.excerpts:
            lines += ["", f"{excerpt.shard}, document {excerpt.document:,}, {excerpt.n_tokens:,} tokens"]
            lines += _quote(excerpt.text)
    return "\n".join(lines + (_batch_lines(inspection.first_batch) if inspection.first_batch else []))


def _copies(found: Repeats, figures: SplitFigures) -> str:
    share = found.repeats / max(found.compared, 1)
    if not found.repeats or found.compared == figures.documents:
        return f"{found.repeats:,} ({share:.2%})" if found.repeats else "none"
    return f"{found.repeats:,} ({share:.2%} +- {(share * (1 - share) / found.compared) ** 0.5:.2%})"


def _where_eot(figures: SplitFigures) -> str:
    share, verb = max((figures.eot_ends, "ends"), (figures.eot_begins, "begins"))
    return f"{verb} {'all' if share == 1 else f'{share:.2%}'}"


def _bytes_by_manifest(figures: SplitFigures) -> str:
    stated = figures.bytes_per_token_by_manifest
    return "not stated" if stated is None else f"{stated:.4f}"


_ROWS: tuple[tuple[str, Callable[[SplitFigures], str]], ...] = (
    ("tokens", lambda f: f"{f.tokens:,}"),
    ("documents", lambda f: f"{'' if f.documents_counted else 'about '}{f.documents:,}"),
    ("shards", lambda f: f"{f.shards:,}"),
    ("lengths measured in shards", lambda f: f"{f.surveyed_shards:,}"),
    ("  tokens per document, mean", lambda f: f"{f.tokens_per_document['mean']:,.1f}"),
    ("  median", lambda f: f"{f.tokens_per_document['median']:,.1f}"),
    ("  90% have at most", lambda f: f"{f.tokens_per_document['p90']:,.1f}"),
    ("  longest", lambda f: f"{f.tokens_per_document['max']:,}"),
    ("  longer than the context", lambda f: f"{f.longer_than_context:.1%} of {f.context:,}"),
    ("documents read", lambda f: f"{f.sampled_documents:,}"),
    ("  tokens in them", lambda f: f"{f.sampled_tokens:,}"),
    ("  UTF-8 bytes per token", lambda f: f"{f.bytes_per_token:.4f}"),
    ("  the same by the manifest, for all", _bytes_by_manifest),
    ("  vocabulary that was never seen", lambda f: f"{f.never_seen:,} of {f.vocab_size:,}"),
    ("  <|endoftext|>", _where_eot),
    ("  nothing but <|endoftext|>", lambda f: f"{f.empty:,}"),
    ("  exact copies of an earlier one", lambda f: _copies(f.exact, f)),
    ("documents compared by 5-grams", lambda f: f"{f.near.compared:,}"),
    (f"  near copies, Jaccard {NEAR} or more", lambda f: _copies(f.near, f)),
)


def _sampling(splits: list[SplitFigures]) -> list[str]:
    """What a sample says of all: two documents far apart are both read with the square of the share that is read."""
    remarks = []
    for f in splits:
        if f.sampled_documents == f.documents and f.near.compared < f.documents:
            remarks.append(f"{f.split}: near copies were looked for among {f.near.compared:,} documents only.")
        if f.sampled_documents < f.documents:
            stands_for = (f.documents / f.sampled_documents) ** 2
            pairs, error = f.exact.pairs * stands_for, f.exact.pairs**0.5 * stands_for
            remarks.append(
                f"{f.split}: {f.sampled_documents / f.documents:.2%} of the documents were read, and mostly one "
                "of two copies: there are more copies than were found, "
                + (
                    f"about {pairs:,.0f} +- {error:,.0f}"
                    if pairs
                    else f"but most likely fewer than {3 * stands_for:,.0f}"
                )
                + " pairs of equal documents."
            )
    return remarks


def _alarms(inspection: Inspection) -> list[str]:
    alarms = []
    for f in inspection.splits:
        if f.outside_vocabulary:
            alarms.append(f"{f.split}: {f.outside_vocabulary:,} tokens lie outside the vocabulary of {f.vocab_size:,}.")
        # Other projects cut their files anywhere: one piece of a document in each is no reason to worry.
        if round((1 - max(f.eot_begins, f.eot_ends)) * f.sampled_documents) > f.shards:
            alarms.append(f"{f.split}: <|endoftext|> neither ends nor begins every document.")
        if f.eot_inside:
            alarms.append(f"{f.split}: {f.eot_inside:,} <|endoftext|> stand inside a document.")
        stated = f.bytes_per_token_by_manifest
        if stated and abs(f.bytes_per_token / stated - 1) > (1e-9 if f.sampled_documents == f.documents else 0.1):
            alarms.append(f"{f.split}: bytes per token are not the manifest's: was another tokenizer used?")
    if (leaked := inspection.val_in_train) and leaked.repeats:
        alarms.append(f"val: {leaked.repeats:,} of {leaked.compared:,} documents read are in train too, word for word.")
    if inspection.first_batch and not inspection.first_batch.labels_shifted:
        alarms.append("The labels of the first batch are not its inputs shifted by one.")
    return alarms


def _histogram(splits: list[SplitFigures]) -> list[str]:
    """A row for each doubling of the length: share of documents with a bar, share of tokens."""
    lines = [f"{'length in tokens':<21}" + "".join(f"{f'documents of {f.split}':<28}{'tokens':<11}" for f in splits)]
    n_rows = max(len(f.documents_by_length) + 3 for f in splits) // 4
    columns = []
    for f in splits:
        pair = np.zeros((2, 4 * n_rows))
        pair[:, : len(f.documents_by_length)] = f.documents_by_length, f.tokens_by_length
        columns.append(pair.reshape(2, n_rows, 4).sum(-1) / pair.sum(-1, keepdims=True))
    full = np.flatnonzero(sum(column[0] for column in columns))
    for row in range(full[0], full[-1] + 1):
        line = f"{2**row:,} to {2 ** (row + 1) - 1:,}".ljust(21)
        for column in columns:
            documents, tokens = column[:, row]
            line += f"{documents:6.1%} {'#' * round(20 * documents / column[0].max()):<21}{tokens:6.1%}     "
        lines.append(line.rstrip())
    return lines


def _batch_lines(batch: FirstBatch) -> list[str]:
    lines = [
        "",
        f"first batch: {batch.micro_steps:,} x {batch.micro_batch_size:,} windows of {batch.seq_len:,} + 1 tokens; "
        f"seed {batch.seed}, sha256 {batch.sha256}",
        f"  {batch.steps:,} steps are {batch.epochs:.2f} epochs; {batch.boundaries:,} <|endoftext|> in this batch, "
        f"{batch.unbroken:.1%} of its windows have none",
        f"  labels are inputs shifted by one: {'yes' if batch.labels_shifted else 'NO'}",
    ]
    for number, (window, texts) in enumerate(zip(batch.windows, batch.shown, strict=True)):
        lines += ["", f"window {number}", f"  {'position':<10}{'input':<32}label"]
        shown = [f"{token:>5} {text!r}" for token, text in zip(window, texts.tokens, strict=False)]
        lines += [f"  {i:<10}{shown[i]:<32}{shown[i + 1]}" for i in range(len(shown) - 1)]
        for start, stop, text in texts.pieces:
            lines += [f"  tokens {start:,} to {stop - 1:,}", *_quote(text)]
        if more := texts.n_pieces - len(texts.pieces):
            lines.append(f"  and the beginnings of {more:,} more documents")
    return lines


def draw_lengths(inspection: Inspection, out: str | Path) -> Path:
    """Document lengths as a PNG file: which lengths the documents have, and in which the tokens lie; returns its path.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no window system
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(f"Document lengths in {Path(inspection.path).resolve().name}", fontsize=13, fontweight="bold")
    axes = figure.subplots(2, 1, sharex=True)
    context = inspection.splits[0].context
    shortest = min(np.flatnonzero(f.documents_by_length)[0] for f in inspection.splits)
    longest = max(len(f.documents_by_length) for f in inspection.splits)
    for axis, what in zip(axes, ("documents", "tokens"), strict=True):
        for f, color in zip(inspection.splits, COLORS * len(inspection.splits), strict=False):
            counts = np.array(getattr(f, f"{what}_by_length"))
            label = f"{f.split}: {f.documents:,} documents, median {f.tokens_per_document['median']:,.0f} tokens"
            edges, shares = EDGES[: len(counts) + 1], 100 * counts / counts.sum()
            axis.stairs(shares, edges, color=color, alpha=0.15, fill=True)
            axis.stairs(shares, edges, color=color, linewidth=1.6, label=label)
        axis.axvline(context, color="#555555", linewidth=1, linestyle="--", label=f"context: {context:,} tokens")
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(EDGES[shortest], context) / 1.3, max(EDGES[longest], context) * 1.3)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axis.set_ylabel(f"% of {what} in each bin")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].set_xlabel("tokens in the document (four bins a doubling)")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)
    return path
