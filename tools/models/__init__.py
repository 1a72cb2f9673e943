"""Making models: training the demo, random checkpoints of released shapes, golden files."""
