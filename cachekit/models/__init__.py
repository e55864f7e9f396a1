"""Denoisers of published models, loaders, and the embedded models."""
