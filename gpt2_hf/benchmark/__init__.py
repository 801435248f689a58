"""Ours and the peers in turns: how fast a step, a start, reading, preparation and scoring are, and what limits them.

In come the parts of the other rooms as they are and peers as their users run them. Out come ratios from one
interleaved run, with the machine's own limits beside them. Rows and measurements may be touched freely: the package
never imports this room.
"""
