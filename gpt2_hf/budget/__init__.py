"""A recipe and a kind of card -> the kernels of a training step there, each with its bytes, on a machine without one.

In comes a recipe. Out come, from the code that PyTorch's compiler writes for the card, a table of what a step launches
and moves, its peak memory, whether the host ever waits, and an estimate of its time. Touch the rates (rates.py) and the
table freely; a newer PyTorch may need another ``stand_in``. That bends torch.cuda for good, so it lives in a process of
its own (worker.py), and nothing else of the package may import this room.
"""
