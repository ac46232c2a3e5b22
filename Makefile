# Every target is a command of report/make.py, which also works without make:
# `python report/make.py report` is `make report`.
PYTHON ?= python3
TARGETS := setup report notebooks demo test faults zip bench verify lab readme clean

.PHONY: help $(TARGETS)
help:
	@"$(PYTHON)" report/make.py

$(TARGETS):
	@"$(PYTHON)" report/make.py $@

# Values reach the command through the environment, as they were typed: make itself
# would expand a dollar sign in them.
ifdef SURNAME
override SURNAME := $(value SURNAME)
export SURNAME
endif
ifdef GIVEN_NAME
override GIVEN_NAME := $(value GIVEN_NAME)
export GIVEN_NAME
endif
ifdef MATRICULATION
override MATRICULATION := $(value MATRICULATION)
export MATRICULATION
endif
