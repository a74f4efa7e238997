# make demo   ten minutes on a CPU: Rein-G, then Rein-A, on embedded scenes
# make test   clean and export leave the tree unchanged, the notebooks run, pytest passes
# make style the code's one hand, by ruff
# make rehearsal  every run and page of the paper preset on generated data with reduced models (an hour on two cores)
# make proofs what takes longer: equations broken on purpose, kills, damaged files, full disks (an hour or two)
# make browser JupyterLab and the site in a Chromium, as a person uses them (a quarter of an hour)
# make coverage which lines of reinpp the notebooks and tests run: 90 % or more (twice as long as make test)
# make lab    JupyterLab
# make docs   the site in _docs/html/: notebooks, guides, API
# make readme README.md from nbs/index.ipynb
# make clean  removes what was built here (.venv and data/ stay)
#
# Each sets up .venv first if it is missing, and again when pyproject.toml or constraints.txt changed.
# The Python it is made with can be named: make PYTHON=/path/to/python3.12 test

BIN       := $(CURDIR)/.venv/bin
INSTALLED := .venv/.installed
RUNS      := data/runs
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PREFER_ENV_PATH := 1
ACTIVE    := PATH="$(BIN):$$PATH"

# Python 3.11 to 3.13 that can make a virtual environment
SUITABLE  := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help demo test style lab docs readme clean proofs rehearsal browser coverage
help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(INSTALLED)
	@mkdir -p $(RUNS)
	@$(ACTIVE) papermill nbs/quickstart.ipynb $(RUNS)/quickstart.ipynb
	@echo
	@cat $(RUNS)/quickstart/table.md
	@echo
	@echo "pictures:          $$(ls $(RUNS)/quickstart/*.png | tr '\n' ' ')"
	@echo "table:             $(RUNS)/quickstart/table.md"
	@echo "executed notebook: $(RUNS)/quickstart.ipynb"

# nbdev_test runs the modules' notebooks and the front page. The others (tables, figures, quickstart ...) train:
# papermill would be needed to choose their small preset, so pytest runs them, through papermill.
test: $(INSTALLED) style
	@$(ACTIVE) python .ci/unchanged.py
	@$(ACTIVE) OMP_NUM_THREADS=1 MPLBACKEND=agg nbdev_test --n_workers 2 --timing --file_re '^([0-9][0-9][a-z]?_|index[.])'
	@$(ACTIVE) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal --durations 15

style: $(INSTALLED)
	@$(ACTIVE) ruff check .

proofs: $(INSTALLED)
	@$(ACTIVE) OMP_NUM_THREADS=1 python -m pytest -q tests/proofs/proof_*.py

rehearsal: $(INSTALLED)
	@rm -rf $(RUNS)/rehearsal
	@$(ACTIVE) OMP_NUM_THREADS=1 python tests/rehearsal.py

# Takes a browser that is there; Playwright fetches one otherwise. REINPP_PICTURES names a folder for what was seen.
browser: $(INSTALLED)
	@.venv/bin/python -m pip install --quiet --editable '.[dev,browser]' --constraint constraints.txt
	@for name in chromium chromium-browser google-chrome; do command -v $$name && break; done || \
	    .venv/bin/python -m playwright install chromium
	@$(ACTIVE) OMP_NUM_THREADS=1 python -m pytest -q -p no:playwright tests/browser/browser_*.py

coverage: $(INSTALLED)
	@$(ACTIVE) coverage erase
	@$(ACTIVE) OMP_NUM_THREADS=1 MPLBACKEND=agg coverage run "$(BIN)/nbdev_test" --n_workers 2 --file_re '^([0-9][0-9][a-z]?_|index[.])'
	@$(ACTIVE) OMP_NUM_THREADS=1 coverage run -m pytest -q -n 2 --dist worksteal
	@$(ACTIVE) coverage combine -q
	@$(ACTIVE) coverage report

lab: $(INSTALLED)
	@$(ACTIVE) jupyter lab

docs: $(INSTALLED)
	@$(ACTIVE) sphinx-build -q -c docs -d _docs/doctrees . _docs/html
	@echo "open _docs/html/index.html"

readme: $(INSTALLED)
	@$(ACTIVE) jupyter nbconvert --config .ci/readme.py --log-level WARN --output-dir . nbs/index.ipynb

clean:
	rm -rf build dist _proc _docs reinpp.egg-info .pytest_cache .hypothesis .coverage*
	find nbs reinpp tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(INSTALLED): pyproject.toml constraints.txt extras.txt
	@if ! .venv/bin/python -c 'import pip; $(SUITABLE)' >/dev/null 2>&1; then \
	  found=; \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3.13 python3 python); do \
	    if "$$python" -c '$(SUITABLE)' >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 with its venv module found (looked for: $(if $(PYTHON),$(PYTHON),python3.12 python3.11 python3.13 python3 python)). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$("$$found" --version)"; \
	  "$$found" -m venv --clear .venv; \
	fi
	@echo "Installing the pinned packages into .venv (about 6 GB, most of it torch; several minutes the first time)"
	@.venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@SAM2_BUILD_CUDA=0 .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --requirement extras.txt
	@touch $@
