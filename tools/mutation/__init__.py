"""Mutation testing of the modules that decide what a model computes: small wrong changes, one by one.

    python -m blt_edge.tools.mutation [MODULE ...] [--sample N] [--jobs N]

runs a module's tests against every mutant of it (`operators`), each in a forked process (`runner`) in which
the module is compiled from the changed tree. A mutant that no test notices has survived: the tests lack
something, or the change is none (`equivalents.json` lists those, each with the reason).

Why not a library: mutmut 3.8 leaves out properties, class bodies and whatever runs at import, drops neither
statements nor operands, and fills the list of survivors with messages and arguments turned into None;
cosmic-ray 8 starts Python and pytest anew for every mutant, which takes longer here than the tests.
"""
