"""Tuning: search for the specs that reach a target on one model."""
