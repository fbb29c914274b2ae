"""Weights from elsewhere in, ours out."""
