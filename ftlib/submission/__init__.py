"""From a config to a job."""
