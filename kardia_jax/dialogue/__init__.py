"""Strings and rows: the four-span grammar, the labels, the dataset, and the way from a dialogue to token ids.

Nothing in this room knows JAX.
"""
