"""Weights -> figures: validation loss, HellaSwag in two ways, samples.

In comes the live model in the loop, or the folder of a finished one. Out come plain numbers and texts, and the model
as it was. Speed and batching may be touched freely; what the figures mean is fixed by lm-evaluation-harness and the
lecture's script, with which `tests/evaluation` compares every pick.
"""
