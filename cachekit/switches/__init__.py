"""Intercept the calls of a denoiser's modules, and skip them."""
