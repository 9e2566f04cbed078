# make report · test · lint · coverage · bench · peers · gpu · full · recipes · ablation · scaling · layers · stability · rates · peer-quality · ground-truth · synth-bench · probes · rehearse · chaos · fuzz · clean — each sets up what it needs.
PYTHON ?= python3
CORES ?= all
FUZZ ?= activation_file dictionary_folder grid published_sae run_files sae_folder store
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# torch's idle OpenMP threads would spin and take cores from other runs
export OMP_WAIT_POLICY := PASSIVE
# Snakemake and Jupyter need a writable home: a user without one gets a temporary one
HOME_WORKS := $(shell home="$${HOME:-$$(getent passwd "$$(id -u)" | cut -d: -f6)}"; [ -d "$$home" ] && [ -w "$$home" ] && echo yes)
ifneq ($(HOME_WORKS),yes)
export HOME := $(or $(TMPDIR),/tmp)/saegrid-$(shell id -u)/home
$(info no home that can be written to: using $(HOME) $(shell mkdir -p -m 700 "$(HOME)"))
endif
# Snakemake's log needs a user name
export USER ?= $(or $(shell getent passwd "$$(id -u)" | cut -d: -f1),uid$(shell id -u))
SNAKEMAKE = snakemake -s workflow/Snakefile --cores $(CORES) --rerun-incomplete --quiet rules

.DEFAULT_GOAL := report
.PHONY: report full recipes ablation scaling layers stability rates peer-quality ground-truth synth-bench probes test lint coverage bench peers gpu rehearse chaos fuzz clean setup

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "make: needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-no-deps.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

report: setup  ## the quick grid on the embedded model, and its website
	$(SNAKEMAKE) --config grid=params/quick.yaml
	@echo "open _site/index.html"

full: setup  ## the published axes on the embedded model
	$(SNAKEMAKE) --config grid=params/full.yaml
	@echo "open _site/index.html"

recipes: setup  ## the published and the improved recipe over three seeds: results/recipes
	$(SNAKEMAKE) --config grid=params/recipes.yaml -- results/recipes/results_tidy.csv

scaling: setup  ## how loss follows dictionary size, K and tokens: results/scaling
	$(SNAKEMAKE) --config grid=params/scaling.yaml -- results/scaling/results_tidy.csv

layers: setup  ## both recipes at six layers and on two texts (hours): results/layers
	$(SNAKEMAKE) --config grid=params/layers.yaml -- results/layers/results_tidy.csv

stability: setup  ## what decides whether another seed finds the same latents: results/stability
	$(SNAKEMAKE) --config grid=params/stability.yaml -- results/stability/results_tidy.csv

rates: setup  ## both recipes at other learning rates: results/rates
	$(SNAKEMAKE) --config grid=params/rates.yaml -- results/rates/results_tidy.csv

peer-quality: setup peers  ## SAEs against other libraries' at matched L0: results/peers
	python benchmarks/peer_quality.py

ground-truth: setup  ## SAEs on rows whose directions are known: results/ground_truth
	python benchmarks/ground_truth.py

synth-bench: setup peers  ## SAELens' synthetic benchmark, this project's SAEs and its peers': results/ground_truth
	python benchmarks/synth_bench.py

probes: setup  ## sparse probes on the runs of the quick grid at K = 64: results/probes
	python benchmarks/probes.py runs/*_k64_*

gpu:  ## the dense kernel on this machine's GPU, with the Python that has torch: benchmarks/gpu.json
	$(PYTHON) benchmarks/gpu.py

rehearse: setup  ## the published setting at full size, on a generated model and files (hours): results/rehearsal.json
	python benchmarks/rehearse.py

ablation: setup  ## the improved recipe without each of its choices: results/ablation
	$(SNAKEMAKE) --config grid=params/ablation.yaml -- results/ablation/results_tidy.csv

test: setup
	pytest -n auto --dist loadfile --no-loadscope-reorder

coverage: setup  ## line and branch coverage of the tests, subprocesses included
	coverage erase
	coverage run -m pytest -n auto --dist loadfile --no-loadscope-reorder
	coverage combine --quiet
	coverage report

peers: $(VENV)-peers/.ready  ## sae-lens, dictionary-learning and sparsify, for the tests and benchmarks against them

$(VENV)-peers/.ready: benchmarks/requirements-peers.lock benchmarks/requirements-peers-no-deps.lock
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.lock
	$(VENV)-peers/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements-peers-no-deps.lock
	touch $@

bench: setup peers  ## a training step against the peers' (hours; shorter with BENCH="--quick")
	python benchmarks/bench.py $(BENCH)
	python benchmarks/page.py

chaos: setup  ## killed, starved and damaged runs must end with the same bytes: CHAOS="--faults 50"
	python tests/chaos.py $(CHAOS)

fuzz: setup  ## coverage-guided fuzzing of every parser, ten minutes each: FUZZ="grid store"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	for target in $(FUZZ); do python tests/fuzz/fuzz.py $$target .fuzz/$$target -max_total_time=600 || exit 1; done

lint: setup
	mypy
	ruff check . && ruff format --check . && nbstripout --verify notebooks/*.ipynb && panache lint --ignore undefined-references --ignore undefined-anchor $$(git ls-files '*.qmd')

clean:
	rm -rf _site report index.qmd .quarto .snakemake
