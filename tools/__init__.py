"""blt_edge.tools: what a person types: the `blt-edge` command, demo training, benchmarks."""
