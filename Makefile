# The targets people need are run and test. CI runs .ci/run, which uses the others.
#
#   make run            builds and serves a disk from ./run until Ctrl-C; needs nothing but Go
#   make test           installs what the tests need and runs them: the short suite
#   make soak T=1h SEED=1   the same tests at full length
#   make fuzz T=10m     every fuzz target for that long each
#   make bench          the benchmarks

SHELL := /bin/bash
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.7.0
PKGS := ./...
RUN := ./run

.DEFAULT_GOAL := build
.PHONY: build run test test-tools minio azurite race soak fuzz bench check fmt-check vet lint tidy-check import-check clean

build:
	CGO_ENABLED=0 go build -trimpath -o bin/gateway ./cmd/gateway

# On a terminal the script gets a process group of its own, so that Ctrl-C reaches it but not make,
# which would otherwise report an interrupt instead of the server's own exit code.
run: build
	@dir=$$(realpath -m $(RUN)); \
	if [ -t 0 ]; then set -m; scripts/run.sh bin/gateway "$$dir"; else exec scripts/run.sh bin/gateway "$$dir"; fi

test-tools:
	@scripts/test-tools.sh

minio:
	@test/minio/build.sh

azurite:
	@test/azure/install.sh

test: test-tools minio azurite
	@GRAINDISK_FRESH=75s scripts/gotest.sh -count=1 -timeout 15m $(PKGS)
	@scripts/gotest.sh -count=1 -timeout 15m -tags planted -run '^TestPlanted$$' ./pool

# The same under the race detector, the gateway that the tests start included; but for suites that measure, compare
# formats or run one command at a time.
NOT_RACED := extract|golden|liars|many|outage|reopen|share|wear

race: test-tools minio azurite
	@GRAINDISK_RACE=1 scripts/gotest.sh -race -count=1 -timeout 15m $$(go list $(PKGS) | grep -vE '/test/($(NOT_RACED))$$')

soak: T = 1h
soak: SEED = 1
soak: test-tools minio azurite
	@GRAINDISK_SOAK=$(T) GRAINDISK_SEED=$(SEED) scripts/gotest.sh -count=1 -timeout 0 $(PKGS)

fuzz: T = 1m
fuzz:
	@scripts/fuzz.sh $(T)

bench:
	go run ./bench

check: fmt-check vet lint tidy-check import-check

fmt-check:
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "not formatted by gofmt:"; echo "$$bad"; exit 1; fi

vet:
	go vet $(PKGS)
	go vet -tags planted $(PKGS)

lint:
	go run $(STATICCHECK) $(PKGS)
	go run $(STATICCHECK) -tags planted ./pool ./internal/planted

tidy-check:
	go mod tidy -diff

import-check:
	go run ./internal/importcheck

clean:
	rm -rf bin .ci/out
