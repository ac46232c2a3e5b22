# Every target is a command of make.py, which also works without make:
# `python make.py report` is `make report`.
PYTHON ?= python3
# Whatever is typed goes there, also where a file or folder has that name
COMMANDS := $(or $(MAKECMDGOALS),help)
$(if $(word 2,$(COMMANDS)),$(error one command at a time, not $(COMMANDS)))

.PHONY: $(COMMANDS)
$(COMMANDS):
	@"$(PYTHON)" make.py $@

# Values reach the command through the environment, as they were typed: make itself
# would expand a dollar sign in them.
OPTIONS := SURNAME GIVEN_NAME MATRICULATION RUN NOTEBOOK WEIGHTS KEEP VENV
$(foreach name,$(OPTIONS),$(if $(value $(name)),\
  $(eval override $(name) := $$(value $(name)))$(eval export $(name))))
