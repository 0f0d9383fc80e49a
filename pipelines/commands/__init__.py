"""The commands, thin ones around the recipes of the same names; `pipelines/cli.py` makes one program of them."""
