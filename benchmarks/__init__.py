"""Measure what cachekit claims; every command writes its figures as data."""
