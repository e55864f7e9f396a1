"""Tiny pipelines, commands and networks that several tests use."""
