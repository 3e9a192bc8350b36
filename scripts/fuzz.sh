#!/bin/sh
# fuzz.sh TIME: runs every fuzz target of the module for TIME, such as 10m, one after the other.
set -eu

time=$1
for package in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "== $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10s "$package"
	done
done
