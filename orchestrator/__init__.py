"""Terrane adapts an open language model to a scientific corpus on whatever Ray cluster is at hand, and serves it."""

__version__ = "0.1.0"
