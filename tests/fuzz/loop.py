"""Fuzz one target: `loop.py TARGET MODULES [libFuzzer options] CORPUS`; `benchmarks/fuzz.py` calls it."""

import sys

import atheris

name, modules, *options = sys.argv[1:]
with atheris.instrument_imports(include=[*modules.split(","), "json"]):
    from tests.fuzz.targets import TARGETS

atheris.Setup([sys.argv[0], *options], TARGETS[name])
atheris.Fuzz()
