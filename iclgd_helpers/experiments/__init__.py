"""Parameters, arms, identity, plan, cost, record: one run, and grids of runs."""
