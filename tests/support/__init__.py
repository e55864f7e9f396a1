"""Pipelines, policies, networks and commands that several test files share."""
