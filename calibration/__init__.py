"""blt_edge.calibration: ranges of activations for quantized graphs."""
