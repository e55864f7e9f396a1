"""Denoisers to load or to build: published architectures, folders, and the embedded models."""
