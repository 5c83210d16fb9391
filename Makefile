# One command each: `make demo`, `make test`, `make check`. Each sets up what it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.5.0
TORCHVISION ?= torchvision==0.28.0 timm==1.0.31
BIN := .venv/bin
OLD := .venv-oldest/bin
PYTEST := -m pytest -q -n 2 --dist worksteal --durations=15
WITH_TORCHVISION := --confcutdir=tests/with_torchvision tests/with_torchvision
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Models of the tests are tiny: more threads than one only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint docs links notebooks browser oldest coverage video third-style wheel study clean

demo: .venv/ready
	$(BIN)/captum-mllm explain --demo --out demo

test: lint
	$(BIN)/python $(PYTEST) -m "not slow"

# What is slow: the studies' tests and their examples, qualities of the shipped models, families
# whose layout another family has in `make test`.
check: .venv/ready browser docs notebooks wheel oldest video third-style
	$(BIN)/python $(PYTEST) -m slow tests docs/studies

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The manual, from clean, warnings are errors: build/docs/index.html. No network is needed.
SPHINX := $(BIN)/sphinx-build -c docs -W --keep-going -q
docs: .venv/ready
	rm -rf build/docs build/doctrees
	$(SPHINX) -b html -d build/doctrees . build/docs
	$(BIN)/python tests/docs/check_site.py build/docs

# Links to other sites, for who has a network.
links: .venv/ready
	$(SPHINX) -b linkcheck -d build/doctrees . build/links

notebooks: .venv/ready
	$(BIN)/python tests/docs/run_notebooks.py tutorials

# The fast tests once more, so coverage (a third more time) is measured here and nowhere else.
oldest coverage: .venv-oldest/ready
	$(OLD)/python $(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered tests

# Real video processors, which need torchvision: it is kept out of the environments, where the
# package must do without.
video: .venv/ready .venv-oldest/ready .torchvision/ready
	PYTHONPATH=.torchvision $(BIN)/python -m pytest -q $(WITH_TORCHVISION)
	PYTHONPATH=.torchvision $(OLD)/python -m pytest -q $(WITH_TORCHVISION)

# What drives the report's page in the tests; without it (no Debian, no rights) these are skipped.
browser:
	-command -v chromium > /dev/null || (apt-get update -qq && apt-get install -y -qq chromium)

# The third drawing style, CC-BY-SA: fetched from npm, in neither the repository nor the wheel.
third-style: .openmoji/openmoji.npz
	CAPTUM_MLLM_DATA=$(CURDIR)/.openmoji $(BIN)/python -m pytest -q tests/reference/test_openmoji.py

# A recorded measurement again, e.g. make study NAME=quality ARGS="--workers 2".
study: .venv/ready
	PYTHONPATH=docs:. $(BIN)/python -m studies.$(NAME) $(ARGS)

wheel: .venv/ready
	rm -rf dist && $(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(BIN)/python tests/check_wheel.py dist

# The CPU build of torch goes first: a looser request would bring the CUDA packages.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

.venv-oldest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	$(OLD)/pip install -q --disable-pip-version-check $(TORCH)
	$(OLD)/pip install -q --disable-pip-version-check "$(OLDEST)" -e ".[dev]"
	touch $@

OPENMOJI := captum_mllm/reference/openmoji.py captum_mllm/reference/sprites.py
.openmoji/openmoji.npz: $(OPENMOJI) | .venv/ready
	CAPTUM_MLLM_DATA=.openmoji $(BIN)/python -m captum_mllm.reference.openmoji --download

.torchvision/ready: | .venv/ready
	rm -rf .torchvision
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target .torchvision $(TORCHVISION)
	touch $@

clean:
	rm -rf .venv .venv-oldest .torchvision .openmoji demo dist build .coverage
