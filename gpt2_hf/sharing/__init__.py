"""Run folders -> everyone: convert, verify, publish.

In comes a run, or the folder of a GPT-2. Out comes a folder, a file of another project's format, or a repository of the
Hub, that tools without our code load with the same logits. Nothing else in the package imports this room: touch
it freely, but nothing may be published that `verify` has not passed.
"""
