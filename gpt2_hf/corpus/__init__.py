"""Documents -> token shards: read, clean, write, check.

In come files, folders and datasets of text, of any size and in any state. Out goes a data folder: shards of tokens,
their manifest, and a report of what was left out and why; or a tokenizer trained on the texts. Touch anything freely
that keeps the bytes of both the same for the same documents, on any number of workers: `tests/corpus` compares them.
"""
