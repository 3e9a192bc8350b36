#!/bin/sh
# Builds the MinIO server that the tests run against, once, and prints where it is:
#
#   ${XDG_CACHE_HOME:-$HOME/.cache}/graindisk/minio-<version>
#
# The version is the one pinned in go.mod beside this script, a module of its own, so that the server's
# dependencies never touch the product's. The first build takes some minutes and about 1.2 GB of module
# cache; later calls only print the path. Safe to run concurrently: the others wait for the first.
set -eu

cd "$(dirname "$0")"
module=github.com/minio/minio
version=$(awk -v m="$module" '$1 == m { print $2 } $1 == "require" && $2 == m { print $3 }' go.mod)
if [ -z "$version" ]; then
	echo "build.sh: go.mod names no version of $module" >&2
	exit 1
fi
dir=${XDG_CACHE_HOME:-$HOME/.cache}/graindisk
binary=$dir/minio-$version
if [ ! -x "$binary" ]; then
	mkdir -p "$dir"
	exec 9>"$dir/minio.lock"
	flock 9
	if [ ! -x "$binary" ]; then
		echo "building $module $version, this takes some minutes the first time" >&2
		part=$(mktemp "$dir/minio-part.XXXXXX")
		trap 'rm -f "$part"' EXIT
		GOWORK=off CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$part" "$module" >&2
		chmod 755 "$part"
		mv -f "$part" "$binary"
	fi
fi
echo "$binary"
