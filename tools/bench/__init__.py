"""Measurements, each one command whose last line of stdout is one JSON document. None of them is a test."""
