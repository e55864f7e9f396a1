"""Count multiply-accumulates and bytes without values: of runs, of estimates, of budgets."""
