"""`python -m blt_edge`: the `blt-edge` command where scripts are not on the path."""

from blt_edge.tools.cli import main

if __name__ == "__main__":
    main()
