"""Policies: the only place that knows a model's insides."""
