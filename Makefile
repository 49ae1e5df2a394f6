# make demo   trains the click-through example on two MPI ranks
# make test   runs the whole test suite: one process, then 1, 2, 3 and 4 MPI ranks
# Both make .venv first, which is quick when it is there already.

PYTHON ?= python3
# PyTorch comes first and by exact version, before anything else can ask for a newer one. Where the usual index has only
# builds for GPUs, name an index of CPU builds; where a GPU is to be used, another build:
#   make test TORCH=torch==2.13.0 TORCH_INDEX=URL
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := .venv/bin
MPIRUN := $(BIN)/mpirun
DEMO_RANKS ?= 2
DEMO_ARGS ?=

# One thread a rank: ranks that share cores only slow each other down with more.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test clean
.DELETE_ON_ERROR:

setup: .venv/installed

# The stamp names the PyTorch that was asked for, so that another TORCH= installs again.
ifneq ($(TORCH),$(shell cat .venv/installed 2>/dev/null))
.PHONY: .venv/installed
endif

.venv/installed: pyproject.toml setup.cfg
	@echo "== set-up: an environment in .venv with $(TORCH); a minute or more, by the network"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --retries 2 $(if $(TORCH_INDEX),--no-deps --extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[mpi,test,examples]"
	@echo "$(TORCH)" > $@

demo: .venv/installed
	@echo "== demo: Wide & Deep on $(DEMO_RANKS) MPI ranks, on click data that it makes itself"
	$(MPIRUN) -n $(DEMO_RANKS) $(BIN)/python examples/ctr.py $(DEMO_ARGS)

test: .venv/installed
	@echo "== tests: one process"
	$(BIN)/python -m pytest tests --ignore=tests/mpi
	@for ranks in 1 2 3 4; do \
		echo "== tests: mpirun -n $$ranks"; \
		$(MPIRUN) -n $$ranks $(BIN)/python -m pytest tests/mpi || exit 1; \
	done

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
