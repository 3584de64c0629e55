"""The decoding engine."""
