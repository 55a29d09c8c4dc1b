# One command each: `make demo` trains and measures, `make test` tests.
# Both work in a virtual environment of their own, .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORK ?= work
FLAGS ?=  # of both trainings, such as --config.optim.total_steps=200
DATA := $(WORK)/data
VAE := $(WORK)/vae
DIT := $(WORK)/dit

# XLA asks the C library for a step's scratch memory again and again. Huge pages
# spare most of its page faults; a single heap that keeps what it has, the rest.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
demo: GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:$\
  glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

.PHONY: demo test test-slow

demo: $(VENV)/.installed-demo
	$(BIN)/python -m vdit_jax.data.moving_digits --config=one --data_dir=$(DATA)
	$(BIN)/python -m vdit_jax.data.tokenizer --data=moving_digits/one \
	  --data_dir=$(DATA) --out=$(DIT)/tokenizer.model
	$(BIN)/python train.py --config=configs/digits.py:vae --workdir=$(VAE) \
	  --config.data.data_dir=$(DATA) $(FLAGS)
	$(BIN)/python -m vdit_jax.cache --autoencoder=$(VAE) \
	  --data=moving_digits/one --data_dir=$(DATA) --name=latents/one
	$(BIN)/python train.py --config=configs/digits.py:dit --workdir=$(DIT) \
	  --config.data.data_dir=$(DATA) --config.data.name=latents/one \
	  --config.autoencoder_workdir=$(VAE) $(FLAGS)
	$(BIN)/python sample.py --checkpoint=$(DIT) --out=$(WORK)/samples/sample.mp4 \
	  --prompts_file=configs/prompts.txt --overwrite
	$(BIN)/python -m vdit_jax.evaluate --checkpoint=$(DIT) \
	  --data=moving_digits/one --data_dir=$(DATA) --metrics=loss,vae,digits \
	  --json=$(WORK)/metrics.json

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

$(VENV)/.installed-%: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[$*]"
	touch $@
