"""Pipelines: everything that touches a Ray Dataset, the configuration and the command line."""
