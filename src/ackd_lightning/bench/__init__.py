"""``ackd bench``: how fast a configuration trains on this machine, where the time goes, and what it needs.

Every measurement is made in a fresh process of its own, methods in turn (A B A B), while the load that other processes
put on the machine is watched. In that process the run is built as ``ackd fit`` builds it, without checkpoints and
validation, and three times as many steps are timed: through the Trainer, as a bare loop of the same pieces, and as that
loop with a stopwatch around each piece.
"""
