"""Facts about torch and diffusers, and nothing else."""
