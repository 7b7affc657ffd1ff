# make demo | make demo-llm | make systems | make benchmark | make verify | make costs
# make check | make test | make lint                                          (each sets itself up)
#
#   make demo PYTHON=python3.12      with another Python, from 3.11 on
#   make demo CORES=4                with so many processor cores; all of them if not given

PYTHON ?= python3
CORES ?= all
ENVIRONMENT := .venv
RUN := $(ENVIRONMENT)/bin/python

.PHONY: demo demo-llm systems benchmark verify costs check test lint setup

# These studies use nothing from a hub; without this a library might contact one anyway.
demo demo-llm systems benchmark verify: export HF_HUB_OFFLINE = 1
demo demo-llm systems benchmark: setup
	@$(RUN) -m snakemake --configfile config/$@.yaml --cores $(CORES)
	@$(MAKE) --no-print-directory results/$@/report.html STUDY=$@
	@$(RUN) -m fedlm tables --config config/$@.yaml --show
	@echo
	@echo "explorer  results/$@/explorer.html   (open this first)"
	@echo "tables    results/$@/tables"
	@echo "figures   figures/$@"
	@echo "report    results/$@/report.html"

# Rebuilt when a table or figure is newer.
results/$(STUDY)/report.html: $(wildcard results/$(STUDY)/pages/* figures/$(STUDY)/*)
	@$(RUN) -m snakemake --configfile config/$(STUDY).yaml --report $@ 2> results/$(STUDY)/report.log \
	    || { cat results/$(STUDY)/report.log; rm -f $@; exit 1; }

# Are the benchmark's records unchanged, do they give its tables, figures and findings, and do runs repeat?
verify: setup
	@$(RUN) -m fedlm verify config/benchmark.yaml --findings docs/findings.md
	@$(RUN) -m fedlm verify config/benchmark-llm.yaml --findings docs/findings-language-model.md \
	    --cheapest 0 --drawn 0 --no-predict

costs: setup
	@$(RUN) -m fedlm costs

# To run before each commit: at most 90 seconds on two cores.
check: lint
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m "not slow and not slurm"

test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m "not slurm"

lint: setup
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m snakefmt --check Snakefile workflow
	@$(RUN) -m snakemake --lint
	@$(RUN) -m mypy

# The environment is installed once, and again when the lock has changed. Where packages come from is up to pip's own
# configuration. pip unpacks on one core, so several share the lock; the last call adds what the lock leaves to the
# platform (the CUDA libraries of torch's build on PyPI). pip would compile all files on one core, which takes as long
# as all else; most of Transformers' models, a sixth of all code, are left until they are used, and what has no syntax
# of this Python is a template or a test.
setup:
	@cmp -s requirements.txt $(ENVIRONMENT)/requirements.txt || { \
	    command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found; allowed: make PYTHON=<python 3.11 or newer>"; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; allowed: 3.11 or newer, as in make PYTHON=python3.12" % sys.version_info[:2])' \
	    && { [ -x $(RUN) ] || $(PYTHON) -m venv $(ENVIRONMENT); } \
	    && grep -v '^#' requirements.txt | xargs -n 25 -P 4 $(RUN) -m pip install --progress-bar off --no-compile --no-deps \
	    && $(RUN) -m pip install --no-compile --requirement requirements.txt \
	    && { $(RUN) -m compileall -q -q -j 0 -x '/tests?/|/transformers/models/[^ab]' $(ENVIRONMENT)/lib || true; } \
	    && cp requirements.txt $(ENVIRONMENT)/requirements.txt; }
