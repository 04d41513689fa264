# Everything that a person or a machine does with this repository. `make` alone lists it.
# Needed: make, Python 3.11 to 3.13, and for `contracts` Node. Nothing else, and no account.

.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?=
ARGS ?=
SEEDS ?= 1000
WORKERS ?= 4

BIN := .venv/bin
PACKAGES := protocol negotiation escrow agents tools examples
SETUP = PYTHON='$(PYTHON)' sh .ci/setup.sh

# Some machines forbid Python to keep what it compiled. Here that costs every process of the tests a
# second, and make clean removes it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-long check style types layers tidy wheels format bench simulate
.PHONY: contracts lock clean
.PHONY: run-env dev-env links

help: ## This table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, ARGS='-k voucher' goes to pytest or to the demo."

demo: run-env ## Watch agents find each other, negotiate, lock, work and settle
	@$(BIN)/coase demo $(ARGS)

test: dev-env ## All tests but the slow ones (under eight minutes on two cores)
	@$(BIN)/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-long: dev-env ## The tests that take minutes or need programs of their own
	@$(BIN)/pytest -m "slow or live" --timeout 1800 $(ARGS)

check: style types layers tidy wheels ## All of the next five

style: dev-env ## Ruff: rules and format
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check --output-format concise .

types: dev-env links ## mypy --strict over sources and tests
	$(BIN)/mypy -p coase -p tests

layers: dev-env ## Imports go down only
	$(BIN)/lint-imports --no-logo

tidy: dev-env ## Sizes, purity, words, links: the code base itself
	$(BIN)/pytest -q tests/test_tidy.py

wheels: dev-env ## Ask the registry: does it all install without a compiler?
	@$(BIN)/python .ci/wheels.py

format: dev-env ## Rewrite the sources in the style that check wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: dev-env ## Measure what the documentation claims
	@$(BIN)/python tests/bench/run.py $(ARGS)

simulate: dev-env ## Thousands of deals in a hostile world: SEEDS=1000, or SEEDS=17..18
	@$(BIN)/python tests/simulation/run.py --seeds $(SEEDS) $(ARGS)

contracts: ## Rebuild and test the Solidity contracts (needs Node)
	@command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 || { \
	  echo "coase: Node is missing, which only the contracts need: apt-get install nodejs npm" >&2; \
	  exit 2; }
	@cd escrow/contracts && ./check.sh

lock: dev-env ## Write constraints.txt anew (ARGS=--upgrade takes newer versions)
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal \
	  --python-version 3.11 --no-header --no-annotate --quiet --output-file constraints.txt $(ARGS)

clean: ## Remove everything that can be made again, .venv included
	rm -rf .venv .venv.discarded-* .links build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -rf .hypothesis .import_linter_cache
	find $(PACKAGES) tests .ci -name __pycache__ -prune -exec rm -rf {} +

run-env:
	@$(SETUP) run

dev-env:
	@$(SETUP) dev

# An editable installation runs, but type checkers do not see through it: they read these links.
links:
	@mkdir -p .links/coase
	@for name in $(PACKAGES); do ln -sfn "../../$$name" ".links/coase/$$name"; done
	@ln -sfn ../tests .links/tests
