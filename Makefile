# make demo: set up and run the main job on the embedded data set.   make test: set up and test.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

.PHONY: demo test lint results clean reliability soak

.venv/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: .venv/.installed
	$(BIN)/pmoe train --config=configs/digits.py --workdir=$(RUNS)/digits_clean
	$(BIN)/pmoe train --config=configs/digits.py --workdir=$(RUNS)/digits_square \
	  --config.trigger.name=square --config.poison.rate=0.1
	$(BIN)/pmoe evaluate --checkpoint=$(RUNS)/digits_square --clean=$(RUNS)/digits_clean \
	  --figures=$(RUNS)/figures

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=30

# The HTML report, tables and figures of docs/claims.md and docs/defences.md, from committed results.
results: .venv/.installed
	$(BIN)/pmoe report experiments/results/cpu_grid experiments/results/defences/* \
	  --output=$(RUNS)/results
	$(BIN)/python experiments/attacks.py --tables=$(RUNS)/results/attacks.md \
	  --figure=$(RUNS)/results/attacks.png
	$(BIN)/python experiments/defences.py --tables=$(RUNS)/results/defences.md \
	  --figure=$(RUNS)/results/defences.png
	$(BIN)/python experiments/verdicts.py --tables=$(RUNS)/results/verdicts.md

# Every check of docs/reliability.md in full, with a table of what was tried and lost: an hour or two
# on two idle cores. Stopped, it goes on with the same command.
reliability: .venv/.installed
	$(BIN)/python tests/reliability/everything.py --output=$(RUNS)/reliability

# Half an hour of training that is watched for what grows.
soak: .venv/.installed
	$(BIN)/python tests/reliability/soak.py --minutes=30 --output=$(RUNS)/soak

clean:
	rm -rf .venv .jax_cache
