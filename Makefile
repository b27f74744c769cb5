# The names that fingers know; each is a script of the same name, which says more with --help or in its first lines.
.PHONY: help demo test unit lint fix bench docs image

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## see it work (root)
	script/demo

test: ## all tests (root)
	script/test

unit: ## the tests that need no root, a minute
	script/test tests/unit

lint: ## format, ruff, mypy --strict, import rules
	script/lint

fix: ## mend what lint can mend
	script/lint --fix

bench: ## measure; asserts nothing (root)
	script/bench

docs: ## the generated parts of docs/
	script/docs

image: ## the container image
	script/image
