"""HTML reports of runs and sweeps, and exports."""
