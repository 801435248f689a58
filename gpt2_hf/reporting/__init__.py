"""Run folders -> a reader: the curves of one run or several.

In come the folders of runs. Out come pictures and lines of text. Nothing else in the package imports this room, so
looks may be touched freely.
"""
