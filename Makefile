# make demo    the tiny recipe through two turns of the flywheel, into runs/demo
# make test    every test that this machine can run
# make test-demo    the demo, and what it must show
# All make .venv first, if it is not there. PYTHON=python3.12 chooses another Python (3.10 to 3.12).

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-demo install

demo: $(INSTALLED)
	$(VENV)/bin/nemo-rmt flywheel tiny run_dir=runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(VENV)/bin/python -m pytest -q

test-demo: demo
	$(VENV)/bin/python -m pytest -q tests/demo/check_demo.py

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt .ci/install
	.ci/install "$(PYTHON)" "$(VENV)"
	@touch $@
