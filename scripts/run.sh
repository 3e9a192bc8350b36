#!/usr/bin/env bash
# run.sh GATEWAY DIR: serves the embedded default from DIR with a disk "demo" of 10 GiB, checks the disk
# with the gateway's own client, says how to attach to it, and stays in the foreground. Ctrl-C or SIGTERM
# ends it with the gateway's own exit code, 0 for a clean close; the next run has the same disk again.
set -euo pipefail

gateway=$1 dir=$2
mkdir -p -m 700 "$dir"
ready=$dir/.ready
rm -f "$ready"
mkfifo -m 600 "$ready"

# The server gets a process group of its own: of a Ctrl-C it hears from this script alone, and once,
# because a second signal would cut its clean close short.
set -m
"$gateway" serve --data "$dir" --disk demo=10GiB </dev/null >"$ready" &
server=$!
set +m
told=
tell() {
	[[ -n $told ]] || kill -TERM "$server" 2>/dev/null || true
	told=1
}
trap tell INT TERM HUP

# finish waits for the server and ends with its exit code. A signal only interrupts the wait.
finish() {
	local code=0
	while kill -0 "$server" 2>/dev/null; do
		wait "$server" || true
	done
	wait "$server" || code=$?
	exit "$code"
}

exec 3<"$ready"
rm -f "$ready"
word='' uri=''
read -r word uri _ <&3 || true
[[ $word == ready ]] || finish # its own last words say why

echo "checking the disk with the gateway's own client"
if ! "$gateway" check-export "$uri"; then
	[[ -z $told ]] || finish
	tell
	wait "$server" || true
	exit 1
fi

socket=${uri#*socket=}
cat <<END

The disk is at $uri
It is kept in $dir and is there again at the next run. To attach it:

  QEMU       -drive file='$uri',format=raw,if=virtio,cache=none,discard=unmap
  kernel     nbd-client -unix '$socket' /dev/nbd0 -name demo -b 4096
  file       nbdfuse /mnt/point '$uri'
  copy       nbdcopy image.raw '$uri'
  look       nbdinfo '$uri'

Ctrl-C ends it.
END
finish
