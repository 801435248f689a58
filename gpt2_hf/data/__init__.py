"""Token shards -> batches: folders near and far, the order of training, the tokenizer, the mask between documents.

In comes a data folder, of ours or another project's layout, on this machine or behind a URL. Out go batches of windows
(grad_accum_steps, B, T + 1), each a function of (seed, step) alone. The order is a promise to every run that was ever
started, and the golden test in `tests/data/test_stream.py` holds it: all else may be touched freely.
"""
