"""Run folders -> a reader: curves as a page or a picture, and where two runs part.

In come the folders of runs. Out come HTML pages, pictures and lines of text. Nothing else in the package imports this
room, so looks may be touched freely.
"""
