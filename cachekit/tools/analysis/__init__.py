"""How a model's outputs change over a run, and what its text and its scheduler are worth: the papers' figures."""
