"""Plugins: hooks, discovery, and the catalog of policies and adapters."""
