"""What lives as long as a run: clock, rows, branches, kept tensors, calls."""
