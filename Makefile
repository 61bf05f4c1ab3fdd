# make demo    the tiny recipe through two turns of the flywheel, into runs/demo
# make test    every test that this machine can run by itself
# make test-slurm    the scripts of slurm/ on a Slurm of two virtual nodes, which it starts and ends; needs root
# make test-demo    the demo, and what it must show, to lm-eval too
# make test-nemo    the NeMo 2.7 and nemo_run surfaces, and the core on NeMo's older Megatron-Core
# make test-bridge    the Megatron-Bridge adapter
# make test-vllm    vLLM's rollouts, and lm-eval's figures against ours
# make bench    the benchmarks, into runs/bench: about half an hour; BENCH="rmt_step --quick" chooses, see benchmarks/run.py
# Each makes its environment first, if it is not there. PYTHON=python3.12 chooses another Python (3.10 to 3.12).

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
NEMO := .venv-nemo
BRIDGE := .venv-bridge
VLLM := .venv-vllm
PYTEST := -m pytest -q
QUIET := OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1

# what the older Megatron-Core could break: model, optimizer, schedules, checkpoints, sampling
ON_OLDER_MEGATRON := $(addsuffix .py,$(addprefix tests/megatron/test_,\
	cpu model train_step optimizer guard checkpoint generation datasets fp8 hugging_face published_layouts))

.PHONY: demo test test-slurm test-demo test-nemo test-bridge test-vllm bench install install-lm-eval

demo: $(INSTALLED)
	$(VENV)/bin/nemo-rmt flywheel tiny run_dir=runs/demo

test: $(INSTALLED)
	$(QUIET) $(VENV)/bin/python $(PYTEST) --ignore=tests/slurm --ignore=tests/with_vllm

test-slurm: $(INSTALLED)
	.ci/install_slurm
	$(QUIET) $(VENV)/bin/python $(PYTEST) tests/slurm tests/test_slurm_scripts.py

test-demo: demo $(VENV)/.lm-eval
	$(VENV)/bin/nemo-rmt evaluate tiny run_dir=runs/demo evaluate.lm_eval.enabled=true
	$(VENV)/bin/python $(PYTEST) tests/demo/check_demo.py

test-nemo: $(NEMO)/.installed
	$(QUIET) $(NEMO)/bin/python $(PYTEST) tests/nemo $(ON_OLDER_MEGATRON)

test-bridge: $(BRIDGE)/.installed
	$(QUIET) $(BRIDGE)/bin/python $(PYTEST) tests/bridge

test-vllm: $(VLLM)/.installed
	$(QUIET) $(VLLM)/bin/python $(PYTEST) tests/with_vllm

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/run.py $(BENCH)

install: $(INSTALLED)

install-lm-eval: $(VENV)/.lm-eval

$(INSTALLED): setup.py constraints.txt .ci/install .ci/venv
	.ci/install "$(PYTHON)" "$(VENV)"
	@touch $@

$(VENV)/.lm-eval: $(INSTALLED)
	.ci/install "$(PYTHON)" "$(VENV)" lm-eval
	@touch $@

$(NEMO)/.installed: setup.py .ci/install_nemo .ci/venv
	.ci/install_nemo "$(PYTHON)" "$(NEMO)"
	@touch $@

$(BRIDGE)/.installed: $(INSTALLED) .ci/install_bridge
	.ci/install_bridge "$(VENV)" "$(BRIDGE)"
	@touch $@

$(VLLM)/.installed: setup.py .ci/install_vllm .ci/venv
	.ci/install_vllm "$(PYTHON)" "$(VLLM)"
	@touch $@
