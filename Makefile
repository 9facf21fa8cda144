# Everything runs in .venv, which the first target that needs it makes. PYTHON: what to make it with.
PYTHON ?= $(shell for found in python3.11 python3.12 python3; do command -v $$found && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-slow check bench-engine bench-thrash bench-gpu bench-peers bench-train quality chaos-jobs faults chaos soak fuzz hub-check docs-check page-check metrics-check k8s-check image-check pins audit clean

install: $(INSTALLED)

# Renewed when the pinned versions change, or what is compiled.
$(INSTALLED): pyproject.toml $(wildcard serve/engine/native/*.[ch]pp)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "Python 3.11 or 3.12 is needed; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv; the first time this takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m deployments.demo

# Two workers: much of it waits, for deadlines and for processes that start.
WORKERS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadscope

# What takes longer, too: some hours.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The first time it also builds llama.cpp's server, in ~/.cache/rookery-peers, which takes some minutes.
bench-engine: $(INSTALLED)
	$(BIN)/python -m loadtest.engine.bench

# Add ARGS=--soak for 10,000 loads and evictions.
bench-thrash: $(INSTALLED)
	$(BIN)/python -m loadtest.engine.thrash $(ARGS)

# Needs a CUDA device; says so, with status 2, where there is none.
bench-gpu: $(INSTALLED)
	@$(BIN)/python -m loadtest.engine.gpu

# Rookery, an LRU of transformers models, Ray Serve's multiplexing, llama.cpp and `transformers serve` on the same
# requests; at most 10 minutes, ends with one JSON line. The first time it also builds llama.cpp and writes the models.
bench-peers: $(INSTALLED)
	@$(BIN)/python -m loadtest peers $(ARGS)

# Against transformers' Trainer on the same texts; ends with one JSON line.
bench-train: $(INSTALLED)
	$(BIN)/python -m loadtest.training.bench $(ARGS)

# Ten bots judged; needs tweets: make quality ARGS="--tweets FOLDER"
quality: $(INSTALLED)
	@$(BIN)/python -m loadtest.training.quality $(ARGS)

# Rookery's clients, a hostile Hub, hostile weights, an outage and 100,000 models; ends with one JSON line.
hub-check: $(INSTALLED)
	@$(BIN)/python -m tests.hub.check $(ARGS)

# Every command of the documents, run as it stands, on a service that they start.
docs-check: $(INSTALLED)
	$(BIN)/python -m pytest tests/docs -m "slow or not slow"

# The page in a real Chromium, as people use it; ends with one JSON line. Add ARGS="--screenshots FOLDER" to keep pictures.
page-check: $(INSTALLED)
	@$(BIN)/python -m tests.web.check $(ARGS)

# Dashboards and alerts, on a real Prometheus that scrapes a live service; ends with one JSON line. Needs the package
# prometheus of Debian or Ubuntu. Add ARGS="--picture FILE.png --dump FILE.jsonl" to see what every panel shows.
metrics-check: $(INSTALLED)
	@$(BIN)/python -m tests.monitoring.check $(ARGS)

# The manifests against schemas, refusals and policies; then a Ray cluster of several pods on this machine, upgraded,
# drained and broken under load; ends with one JSON line. Needs kubectl, and for the cluster root on Linux with Debian's
# iproute2 and redis-server. Without the cluster: ARGS=--offline
k8s-check: $(INSTALLED)
	@$(BIN)/python -m tests.k8s.check $(ARGS)

# The image, built from its Dockerfile without Docker and started read-only as it is in a cluster; ends with one JSON line.
# Needs root and Debian's buildah and mmdebstrap, and takes some 10 minutes and 15 GB.
image-check: $(INSTALLED)
	@$(BIN)/python -m tests.k8s.image_check $(ARGS)

# Versions and hashes of all that the image installs, from pyproject.toml and what is installed here. Asks PyPI and PyTorch;
# ARGS="--torch-cpu-index URL" asks another index for torch without CUDA.
pins: $(INSTALLED)
	$(BIN)/python -m tests.k8s.write_locks $(ARGS)

# Known vulnerabilities of what the image installs. Asks PyPI; ARGS="--vulnerability-service osv" asks OSV. The lock with
# CUDA has of every package the version that PyPI knows; the other differs from it in torch alone. --strict: what could
# not be asked about is a failure.
audit: $(INSTALLED)
	$(BIN)/pip-audit --strict --require-hashes --disable-pip --requirement k8s/requirements/cuda.txt $(ARGS)

# Trainers killed at random, on either database; ends with one JSON line.
KILLS ?= 200
DB ?= sqlite
chaos-jobs: $(INSTALLED)
	@$(BIN)/python -m tests.faults.chaos_jobs --kills $(KILLS) --db $(DB) $(ARGS)

# The table of faults, row by row; some hours for all. make faults ROWS=F1,B3 SHARE=0.1; SAVE=1 also writes its README.
ROWS ?=
SHARE ?= 1
faults: $(INSTALLED)
	@$(BIN)/python -m tests.faults --rows "$(ROWS)" --share $(SHARE) $(if $(SAVE),--save)

# Two generators, two gateways and a trainer under load, and faults at random; ends with one JSON line.
MINUTES ?= 20
SEED ?= 1
chaos: $(INSTALLED)
	@$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) --seed $(SEED) $(ARGS)

# Bad requests at a live service, as raw bytes through HAProxy; ends with one JSON line. ARGS="--proxy ray": without it.
CASES ?= 100000
fuzz: $(INSTALLED)
	@$(BIN)/python -m tests.faults.fuzz --cases $(CASES) --seed $(SEED) $(ARGS)

# A service in ordinary use for a long time: does it need more and more? Ends with one JSON line. make soak MINUTES=480
soak: MINUTES = 30
soak: $(INSTALLED)
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# Not .rookery: bots and jobs live there.
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info serve/engine/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
