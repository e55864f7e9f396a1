"""Records of runs, and the reports on them."""
