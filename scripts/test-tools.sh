#!/bin/sh
# Installs the programs that the tests drive the gateway with, those that are missing, by apt-get: as
# root, or with sudo.
set -eu

# Each program and the Debian package it comes in.
tools='
nbdinfo     libnbd-bin
nbdcopy     libnbd-bin
nbdsh       python3-libnbd
nbd-client  nbd-client
qemu-img    qemu-utils
qemu-io     qemu-utils
qemu-nbd    qemu-utils
fio         fio
nbdkit      nbdkit
mkfs.ext4   e2fsprogs
e2fsck      e2fsprogs
'

PATH=$PATH:/usr/sbin:/sbin
missing=$(echo "$tools" | while read -r program package; do
	[ -z "$program" ] || command -v "$program" >/dev/null || echo "$package"
done | sort -u)
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "test-tools: install these packages, or what your system calls them:" $missing >&2
	exit 1
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
	if ! command -v sudo >/dev/null; then
		echo "test-tools: not root and no sudo; as root run: apt-get install" $missing >&2
		exit 1
	fi
	as_root=sudo
fi
echo "test-tools: installing" $missing
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q
# shellcheck disable=SC2086 # one word for each package
$as_root apt-get install -q -y --no-install-recommends $missing
