"""Jobs: what one asks of the cluster, how it is submitted, and how it stands."""
