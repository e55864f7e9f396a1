"""Hold the data files of cachekit: the true architectures of published models."""
