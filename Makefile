# Two commands, each doing all its set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUANTISERS := $(VENV)/quantisers
HARNESS := $(VENV)/harness
FUZZER := $(VENV)/fuzzer
DEEPSPEED := $(VENV)/deepspeed
DOCS := $(VENV)/docs
# The base that is too large for the repository.
WORDS := outputs/forgetting/bases/words-0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-isolation test test-slow docs bench evidence evidence-full format clean

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

demo-isolation: $(READY)
	$(BIN)/python examples/core_isolation.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY) $(QUANTISERS) $(HARNESS) $(FUZZER) $(DEEPSPEED)
	$(BIN)/python -m pytest -m slow
	PYTHONPATH=$(HARNESS) $(BIN)/python -m pytest tests/evaluation/test_harness.py -m "slow or not slow"
	PYTHONPATH=$(HARNESS) $(BIN)/python -m pytest tests/benchmarks/test_real.py -m slow -k lm_eval
	PYTHONPATH=$(QUANTISERS) $(BIN)/python -m pytest tests/deltas/test_beside.py tests/training/test_quantised.py
	PYTHONPATH=$(FUZZER) $(BIN)/python -m pytest tests/checkpoints/test_robust.py -m slow -k atheris
	PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest tests/training/test_zero3.py -m slow

# Into build/site. Not --quiet: with it warnings are not counted, and --strict lets them pass. The variable is for
# Material's notice of its successor.
docs: $(READY) $(DOCS)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(DOCS) $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/bars.py

evidence: $(READY)
	$(BIN)/python benchmarks/forgetting/evidence.py

evidence-full: $(READY) $(WORDS)
	$(BIN)/python benchmarks/forgetting/evidence.py --full
	$(BIN)/python benchmarks/forgetting/search.py
	$(BIN)/python benchmarks/forgetting/sizes.py
	$(BIN)/python benchmarks/forgetting/report.py

$(WORDS): | $(READY)
	$(BIN)/python benchmarks/forgetting/pretrain_words.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch alone first: resolved together with the rest, pip may take a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# Beside the environment: PEFT imports these wherever it finds them, which takes a second and is loud.
$(QUANTISERS): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ bitsandbytes torchao

# Beside the environment: its requirements are forty packages, and other versions of some that are here.
$(HARNESS): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ lm-eval requests urllib3 \
	  certifi charset-normalizer sacrebleu portalocker tabulate colorama lxml

# Beside the environment: there are wheels for a few platforms and versions of Python only.
$(FUZZER): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ atheris

# Beside the environment: transformers and accelerate import it wherever they find it.
$(DEEPSPEED): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ deepspeed hjson \
	  py-cpuinfo ninja einops

# Beside the environment, with all that it requires: the tests run with the versions that are in it.
$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --target $@ mkdocs-material \
	  "mkdocstrings[python]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs
