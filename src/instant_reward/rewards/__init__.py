"""Rewards: what rates a text while it is written."""
