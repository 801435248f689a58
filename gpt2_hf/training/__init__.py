"""Batches -> checkpoints: the loop, what it is built of, and what can go wrong in it.

In come a recipe (`RunConfig`) and a data folder. Out comes a run's folder: checkpoints that are whole or absent, the
finished model, and a row for each measurement. Anything may be touched that keeps the losses of `tests/training` equal,
to the last bit on one topology.
"""
