"""Helpers of `tools/train_demo.py`: the training-time forward pass, data rows and evaluation."""
