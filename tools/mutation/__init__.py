"""Mutation testing of the modules that decide what a model computes: small wrong changes, one by one.

    python -m blt_edge.tools.mutation [MODULE ...] [--sample N] [--jobs N]

runs a module's tests (`targets`) against every mutant of it (`operators`), each in a forked process
(`runner`) in which the module is compiled from the changed tree. A mutant that no test notices has survived:
the tests lack something, or the change is none (`equivalents.json` lists those, each with the reason).

mutmut 3 leaves out decorated functions (properties, most of a dataclass) and names modules by their files'
paths, which the mapping of folders to `blt_edge` breaks; cosmic-ray starts Python and pytest anew for every
mutant, which takes longer here than the tests.
"""
