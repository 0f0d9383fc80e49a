# make setup | demo | test | check | coverage    (each of the others sets up first)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
EXTRAS := cpu,train,influence,s3,test
OUT ?= demo-out

.PHONY: setup demo test slow check fuzz notebooks coverage constraints clean

setup: $(STAMP)

# uv comes from pip into a small environment of its own and fills .venv under constraints.txt.
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv; }
	test -x $(BIN)/python || .uv/bin/uv venv --quiet --python $(PYTHON) $(VENV)
	.uv/bin/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable '.[$(EXTRAS)]'
	mkdir -p .links/tarsift
	for p in clip_detect operators pipelines sifters; do ln -sfn ../../$$p .links/tarsift/$$p; done
	ln -sfn ../../tarsift/__init__.py .links/tarsift/__init__.py
	touch $@

demo: setup
	$(BIN)/tarsift demo --out $(OUT)

# Two at a time, those of a file one after the other: what a file's tests share is made once.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

# Only files that have some are looked through, which for all of them takes a quarter of a minute in each process.
slow: setup
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations 15 $$(grep -rl --include='*.py' mark.slow tests)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	cd .links && ../$(BIN)/lint-imports --config ../pyproject.toml
	.ci/audit $(BIN)

# One hour of CPU per parser, on a core each if run side by side with --target; goes on where it stopped.
fuzz: setup
	.uv/bin/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable '.[fuzz]'
	$(BIN)/python benchmarks/fuzz.py

notebooks: setup
	$(BIN)/python examples/execute.py

coverage: setup
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

# Resolve afresh and write down what was chosen: name==version of every package, no address. What only `gpu` needs,
# which excludes `cpu`, goes to a file of its own.
COMPILE := .uv/bin/uv pip compile --quiet --no-annotate --no-header --no-emit-index-url --no-emit-find-links --python-version 3.11 pyproject.toml
constraints:
	$(COMPILE) --extra cpu --extra train --extra influence --extra s3 --extra cluster --extra aws --extra test --extra fuzz -o constraints.txt
	$(COMPILE) --extra gpu --constraints constraints.txt | grep -vxFf constraints.txt > deploy/docker/constraints-gpu.txt

clean:
	rm -rf $(VENV) .uv .links build *.egg-info
