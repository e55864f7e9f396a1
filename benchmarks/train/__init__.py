"""Training, export and evaluation of the embedded models."""
