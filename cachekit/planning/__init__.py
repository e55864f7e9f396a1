"""From policies and targets to a plan: the table of steps and actions."""
