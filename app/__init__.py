"""Hone, a model server that keeps its models sharp. Start at `app.domain` (facts) and `app.serving.service` (the hot path)."""

__version__ = "0.1.0"
