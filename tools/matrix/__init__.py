"""Which versions of Python and of other packages blt-edge works with, found out by running it."""
