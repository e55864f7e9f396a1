"""Measurements behind the figures in the documents; every command writes its figures as data."""
