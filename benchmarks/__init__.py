"""Measuring: ours beside its peers, the input pipeline, and where the time of a step goes."""
