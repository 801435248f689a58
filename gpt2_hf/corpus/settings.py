"""What to turn into token shards, and how: the settings of a preparation."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..knobs import ConfigError, Filled, PathName, Range
from .contamination import describe_evaluations
from .read import Source

VAL_FRACTION = 0.01  # by default

SHAKESPEARE_VAL = ("a-midsummer-night-s-dream", "macbeth")


@dataclass(frozen=True)
class PrepareConfig(Source):
    """What to turn into token shards, and how.

    Args:
        inputs: .txt, .json, .jsonl, .ndjson (also .gz, .zst, .bz2, .xz) or .parquet files, folders or globs;
            "shakespeare" is built in.
        dataset: instead of inputs, a dataset on the Hub (streamed) or a folder that save_to_disk wrote.
        name: configuration of the Hub dataset, such as sample-10BT.
        revision: commit, tag or branch of the Hub dataset.
        split: split of the dataset to read.
        text_field: field or column that has the text, data.text for one inside another; a .txt file is one document.
        encoding: of text files, such as latin-1 or utf-16.
        separator: or a .txt is cut into documents at this text, such as "<|endoftext|>".
        tokenizer: instead of GPT-2's, another byte-level BPE: a folder with a tokenizer.json, or a model of the Hub. It
            is copied to OUT/tokenizer, where all that uses the data finds it.
        out: folder to write to.
        workers: processes; 0 means one per core. The shards do not depend on it.
        tokens_per_shard: a new shard starts when the last one has this many tokens.
        val_fraction: share of the documents held out for validation, 0 for none (default 0.01, and so many more that
            there are about 8,000 tokens, or a tenth of a small corpus).
        val_documents: or the number of documents held out (copies of one text stay together).
        val_ids: or the ids of the documents held out (field "id"; for a .txt file its name without suffix).
        on_error: what to do with a document or file that cannot be used: skip it and report it, or stop.
        dedup: none, exact (of equal texts the first stays), or minhash (also of nearly equal ones).
        exclude_wikipedia: leave out Wikipedia's pages, as WebText did (known by "url" or their first lines).
        decontaminate: "hellaswag", or .jsonl files of evaluation items: documents that share a passage with one...
        contaminated: ...are dropped, or only reported.
        decontaminate_ngram: words that such a passage has.
        overwrite: replace what the folder holds if something else was prepared there.
        export: also write the shards in another program's format: llmc, to OUT/llmc.
        executor: where the work is done: local, slurm or ray (datatrove's).
        slurm_partition: partition to submit to.
        slurm_time: time limit of a job.
        slurm_memory_gb: memory of a task, for Slurm and Ray.
    """

    tokenizer: Annotated[str, PathName()] | None = None
    out: Annotated[str, PathName()] = ""
    workers: Annotated[int, Range(0, 10_000)] = 0
    tokens_per_shard: Annotated[int, Range(1)] = 100_000_000
    val_fraction: Annotated[float, Range(0, below=1)] | None = None
    val_documents: Annotated[int, Range(0)] | None = None
    val_ids: tuple[str, ...] = ()
    on_error: Literal["skip", "stop"] = "skip"
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: tuple[Annotated[str, PathName()], ...] = ()
    contaminated: Literal["drop", "report"] = "drop"
    decontaminate_ngram: Annotated[int, Range(1, 100)] = 13
    overwrite: bool = False
    export: Literal["none", "llmc"] = "none"
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm_partition: str = ""
    slurm_time: Annotated[str, Filled()] = "24:00:00"
    slurm_memory_gb: Annotated[int, Range(1, 10_000)] = 4

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty: name the folder to write to, such as --out data/mine")
        super().__post_init__()
        if (self.val_fraction is not None) + (self.val_documents is not None) + bool(self.val_ids) > 1:
            raise ConfigError("val_fraction, val_documents and val_ids are set together: keep one of them")
        if self.executor == "slurm" and not self.slurm_partition:
            raise ConfigError("slurm_partition is empty: name the partition to submit to, see sinfo")

    def resolved(self) -> "PrepareConfig":
        """The same with the validation split's default filled in."""
        if self.val_fraction is not None or self.val_documents is not None or self.val_ids:
            return self
        if self.inputs == ("shakespeare",):
            return replace(self, val_ids=SHAKESPEARE_VAL)
        return replace(self, val_fraction=VAL_FRACTION)

    def recorded(self) -> dict[str, Any]:
        """What the shards depend on, as JSON: no worker count, names in place of local paths, and no tokenizer, which
        is recorded by its content."""
        values = asdict(self)
        for name in ("tokenizer", "out", "workers", "overwrite", "on_error", "export", "executor"):
            del values[name]
        values = {name: value for name, value in values.items() if not name.startswith("slurm_")}
        if self.encoding == "utf-8":  # as in manifests from before there was a choice
            del values["encoding"]
        values["inputs"] = [Path(item).name for item in self.inputs]
        values["decontaminate"] = describe_evaluations(self.decontaminate, self.decontaminate_ngram)
        values["val_ids"] = list(self.val_ids)
        if self.dataset and Path(self.dataset).is_dir():
            values["dataset"] = Path(self.dataset).name
        return values
