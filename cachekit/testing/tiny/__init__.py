"""Tiny diffusers pipelines with seeded weights, and calls of them.

Nothing is downloaded. Each builder gives the same weights at every call.
"""
