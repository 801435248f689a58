"""Documents -> token shards: read, clean, write, check.

In come files, folders and datasets of text, of any size and in any state. Out goes a data folder: shards of tokens,
their manifest, and a report of what was left out and why. Touch anything freely that keeps the bytes of the shards the
same for the same documents, on any number of workers: `tests/corpus` compares them.
"""
