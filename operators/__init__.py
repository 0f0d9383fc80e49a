"""Operators: everything that touches a batch, usable alone, without Ray."""
