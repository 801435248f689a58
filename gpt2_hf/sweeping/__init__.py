"""Recipes and seeds -> whether one recipe is better than another, and how sure that is.

In come recipes, values of their knobs, and seeds. Out come run folders, each made by a process of its own, and of them
a table, a picture and a verdict. Touch freely how they are run and shown; the rule of significance is in `compare`,
which `tests/sweeping` holds to scipy and to hand-made figures.
"""
