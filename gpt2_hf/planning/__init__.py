"""A recipe and a machine -> what to expect of them, before a run.

In comes a recipe, and what this machine or another is said to have. Out come one page of figures (plan) and one of
findings (doctor). Touch the predictions freely; each is held to what was measured.
"""
