"""Calibrations: weights measured on one model, with which past outputs stand in for skipped ones."""
