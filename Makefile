# Every target sets up what it needs: a .venv in the checkout, with the versions of constraints.txt;
# where CI is set, with the very files whose hashes locked.txt lists.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: fuzz demo check lint types test slow fix fixtures golden picture pages docs real llm-compressor mlflow loaders serve-check bench peers growth chaos lock audit release clean

demo: .venv/ready  ## convert the bundled model and adapter, load the result, generate from it
	$(BIN)/convert --base fixtures/tiny-base --adapter fixtures/tiny-adapter --out build/demo --overwrite
	$(BIN)/python fixtures/generate.py build/demo "When an exception is raised"

check: lint types test  ## what CI runs

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# All tests of a file run in one process: what a module prepares is prepared once, and a kernel is compiled once.
BY_FILE := --dist loadfile --no-loadscope-reorder
test: .venv/ready
	$(BIN)/python -m pytest -n 2 $(BY_FILE) -m "not slow and not mlflow" --cov --cov-report= --cov-fail-under=95

slow: .venv/ready  ## the tests that take too long for each commit: samples of faults, cold starts, a cluster that loses a node
	$(BIN)/python -m pytest -n 2 $(BY_FILE) -m slow

fix: .venv/ready  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fixtures: .venv/ready  ## train the bundled model and adapter anew; about ten minutes
	$(BIN)/python fixtures/make_tiny.py

golden: .venv/ready  ## write the expected receipts and screens anew; read the diff before you commit it
	$(BIN)/python fixtures/make_golden.py
	PYTHONPATH=. $(BIN)/python -m tests.cli.screens

picture: .venv/ready  ## draw docs/report.png anew, the report that README shows; needs Chromium
	$(BIN)/python tools/picture.py

pages: .venv/ready  ## write docs/options.md, and tables of other pages, anew from help, tests and records
	PYTHONPATH=. $(BIN)/python -m tests.docs.test_options_page
	PYTHONPATH=. $(BIN)/python -m tests.merge.test_adapters_page
	PYTHONPATH=. $(BIN)/python -m tests.test_architectures
	PYTHONPATH=. $(BIN)/python -m tests.docs.test_measured_tables
	PYTHONPATH=. $(BIN)/python -m tests.docs.test_peers_table

docs: .venv/ready  ## build the site of docs/ in build/site; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

real: .venv/ready  ## a real language model: beside the usual flow, calibrated, from quantized bases; downloads 93 MB
	$(BIN)/python fixtures/real/compare.py
	$(BIN)/python fixtures/real/calibrated.py
	$(BIN)/python fixtures/real/formats.py
	$(BIN)/python fixtures/real/kinds.py
	$(BIN)/python fixtures/real/quantized_bases.py

llm-compressor: .venv/ready  ## the environment of llm-compressor, beside which `make real` then measures; takes 1.5 GB
	$(BIN)/python tools/environments.py llm-compressor build/llm-compressor

mlflow: .venv/ready  ## a real MLflow server in an environment of its own, and the tests that ask it; downloads 120 MB
	$(BIN)/python tools/environments.py mlflow build/mlflow
	PYTHONPATH=. build/mlflow/bin/python -m pytest -m mlflow tests/write/stores

LOADED = transformers==4.57.6 transformers==5.24.0
loaders: .venv/ready  ## outputs loaded by transformers 4.57 and 5 in environments of their own; downloads 500 MB
	PYTHONPATH=. $(BIN)/python tools/loaders.py make build/loaders
	PYTHONPATH=. $(BIN)/python tools/ropes.py make build/loaders
	for wanted in $(LOADED); do \
		test -x build/loaders/$$wanted/bin/python || $(PYTHON) -m venv build/loaders/$$wanted || exit 1; \
		build/loaders/$$wanted/bin/python -m pip install --quiet --disable-pip-version-check \
			$$wanted $$(grep -E '^(torch|bitsandbytes|accelerate|safetensors|numpy)==' constraints.txt) || exit 1; \
		build/loaders/$$wanted/bin/python tools/loads.py build/loaders || exit 1; \
		build/loaders/$$wanted/bin/python tools/ropes.py compute build/loaders || exit 1; \
	done
	PYTHONPATH=. $(BIN)/python tools/loaders.py compare build/loaders
	$(BIN)/python tools/ropes.py compare build/loaders

serve-check: .venv/ready  ## real servers on the CPU load each format, and agree with transformers; downloads 2.5 GB
	$(BIN)/python tools/environments.py vllm build/serve/vllm
	$(BIN)/python tools/environments.py transformers build/serve/transformers
	PYTHONPATH=. $(BIN)/python tools/serve_check.py build/serve

bench: .venv/ready  ## measure time and memory beside the usual flow; twenty minutes, 20 GB of disk
	$(BIN)/python benchmarks/bench.py

PEERS = mergekit axolotl unsloth-zoo llm-compressor auto-round
peers: .venv/ready  ## other tools at their own jobs beside this one; half an hour, 8 GB of environments, 8 GB of models
	for peer in $(PEERS); do $(BIN)/python tools/environments.py $$peer build/peers/$$peer || exit 1; done
	$(BIN)/python benchmarks/peers/peers.py

growth: .venv/ready  ## how time and memory grow up to 8 B, 100,000 tensors, 200 adapters, rank 256; 23 GB of disk
	$(BIN)/python benchmarks/growth.py

fuzz: .venv/ready  ## feed the parsers of foreign files nonsense; MINUTES=10, more by coverage with `pip install atheris`
	$(BIN)/python -m fuzz --minutes $(or $(MINUTES),10)

chaos: .venv/ready  ## kill, fill, break and cut the power of conversions; a quarter of an hour, root for the disks
	$(BIN)/python -m chaos --json build/chaos.json

lock:  ## write locked.txt anew from constraints.txt; needs an index, or a folder, with torch's CPU build
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check pip==26.3 packaging==26.3 uv==0.13.9
	build/lock/bin/python tools/lock.py

audit: .venv/ready  ## ask PyPI for known vulnerabilities of every locked package; AUDIT='-s osv' asks another service
	$(BIN)/python tools/audit.py $(AUDIT)

release: .venv/ready  ## the files of a release, in dist/, if the tree is committed and passes audit and check
	$(BIN)/python tools/release.py $(AUDIT)

PIP := $(BIN)/python -m pip --disable-pip-version-check
NO_CUDA := If torch has the wrong hash, or NVIDIA packages are missing, pip took the CUDA build: remove .venv, name the \
	index of PyTorch CPU builds in PIP_EXTRA_INDEX_URL, use a Python for which the head of locked.txt has the CPU build; \
	or unset CI, to install without hashes.

.venv/ready: pyproject.toml constraints.txt locked.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, as PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef CI
	$(PIP) install --quiet --require-hashes --no-deps --requirement locked.txt || { echo '$(NO_CUDA)' >&2; exit 1; }
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(PIP) check || { echo '$(NO_CUDA)' >&2; exit 1; }
else
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
endif
	touch $@

clean:
	rm -rf build .venv
