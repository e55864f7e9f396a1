"""Try policies on every diffusers pipeline that can be built small from configuration alone."""
