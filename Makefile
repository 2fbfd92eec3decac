# make demo    train DMNN and RNP on the embedded data and compare them with the static net of the same cost
# make test    the test suite          make check   format, lint, types, tests
# make cifar10 the experiments of the README; DATA: an .npz or the folder into which CIFAR-10 is downloaded
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DATA ?= data
TARGETS := --flops-target 0.4 --flops-target 0.6 --flops-target 0.8
CIFAR10 := dense static_60 rnr dmnn rnp static_40 static_80 given

.PHONY: demo test lint check format slow coverage cifar10 table clean

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/ready
	@rm -rf $(DEMO)
	$(BIN)/dynroute train router.name=static router.width=0.49 backbone.parts=16 router.epochs=6 --out $(DEMO)/static
	$(BIN)/dynroute train router.name=dmnn router.epochs=7 --out $(DEMO)/dmnn
	$(BIN)/dynroute train -c experiments/shapes/rnp.yaml --out $(DEMO)/rnp
	$(BIN)/dynroute eval $(DEMO)/static
	$(BIN)/dynroute eval $(DEMO)/dmnn --flops-target 0.5
	$(BIN)/dynroute eval $(DEMO)/rnp --flops-target 0.5
	$(BIN)/dynroute compare $(DEMO)/static $(DEMO)/dmnn $(DEMO)/rnp --out $(DEMO)/comparison

test: .venv/ready
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 -m 'not slow' --cov --cov-report=term --cov-fail-under=90

lint: .venv/ready
	$(BIN)/ruff format --check src tests experiments
	$(BIN)/ruff check src tests experiments
	$(BIN)/mypy

check: lint test

format: .venv/ready
	$(BIN)/ruff format src tests experiments
	$(BIN)/ruff check --fix src tests experiments

# Each run resumes where it was stopped; a finished one is only evaluated again.
cifar10: .venv/ready
	@for name in $(CIFAR10); do \
	  $(BIN)/dynroute train -c experiments/cifar10/$$name.yaml data.path=$(DATA) --out runs/cifar10/$$name --resume && \
	  case $$name in \
	    dense|given|static_*) $(BIN)/dynroute eval runs/cifar10/$$name ;; \
	    *) $(BIN)/dynroute eval runs/cifar10/$$name $(TARGETS) || test $$? -eq 3 ;; \
	  esac && \
	  mkdir -p experiments/results/cifar10 && cp runs/cifar10/$$name/eval.csv experiments/results/cifar10/$$name.csv || exit 1; \
	done
	@$(MAKE) table

# The README's table, from the CSVs.
table: .venv/ready
	$(BIN)/dynroute compare experiments/results/cifar10 --out experiments/results/comparison
	$(BIN)/python experiments/readme_table.py README.md experiments/results/comparison/table.md

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build
