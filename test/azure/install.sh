#!/bin/sh
# Installs the Azurite server that the tests run against, once, and prints where its main program is:
#
#   ${XDG_CACHE_HOME:-$HOME/.cache}/graindisk/azurite-<version>/node_modules/azurite/dist/src/blob/main.js
#
# Version and dependencies are those of package-lock.json beside this script. It needs Node.js 20 or newer
# with npm. Safe to run concurrently: the others wait for the first.
set -eu

cd "$(dirname "$0")"
version=$(sed -n 's/.*"azurite": "\([0-9.]*\)".*/\1/p' package.json)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/graindisk
home=$dir/azurite-$version
main=$home/node_modules/azurite/dist/src/blob/main.js
if [ ! -f "$home/complete" ]; then
	command -v npm >/dev/null || {
		echo "install.sh: npm is missing: install Node.js 20 or newer" >&2
		exit 1
	}
	mkdir -p "$dir"
	exec 9>"$dir/azurite.lock"
	flock 9
	if [ ! -f "$home/complete" ]; then
		echo "installing azurite $version" >&2
		rm -rf "$home"
		mkdir "$home"
		cp package.json package-lock.json "$home"
		(cd "$home" && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error >&2)
		touch "$home/complete"
	fi
fi
echo "$main"
