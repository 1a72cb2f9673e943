"""blt_edge.graphs: what a BLT computes, as ONNX graphs without weights. Knows no files."""
