"""Train, export and measure the embedded model."""
