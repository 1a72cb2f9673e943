"""Hostile files and requests, made by the thousand, against everything that reads what nobody vouches for.

    python -m blt_edge.tools.fuzz [TARGET ...] [--seed N] [--count N]

An input is a valid one that was spoilt (`mutate`) by a random state of its own, so that a seed, a target and
a number name it. A target (`targets`) reads it as the product does; that may end well or in a `BltError`, and
in nothing else. `worker` runs targets in processes of their own, and sees crashes, time, memory and what is
opened outside the input's directory.

Why not a library: atheris follows coverage, so an input depends on all before it and no seed names it, and it
ends at the first fault; hypothesis makes some hundred inputs a second.
"""
