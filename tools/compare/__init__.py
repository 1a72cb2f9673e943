"""Bundles side by side: size, quality against the first one, speed, memory: behind `blt-edge compare`."""
