#!/bin/sh
# gotest.sh [go test arguments]: runs "go test -v" and prints one line for each package, with its time,
# as go test itself would, the lines that tests logged as "COUNT ...", and everything a failing package said. A test that was skipped fails the run,
# unless SKIP_OK, a regular expression, matches its name: what is required must not go untested unseen.
set -u

status=$(mktemp)
trap 'rm -f "$status"' EXIT
{ go test -v "$@" 2>&1; echo $? >"$status"; } | awk -v ok="${SKIP_OK:-}" '
	{ line[++n] = $0 }
	/: COUNT / { sub(/^ *[^ ]*: COUNT /, "  count: "); count[++counts] = $0 }
	/^ *--- SKIP: / {
		name = $3
		if (ok == "" || name !~ ok) skipped[++skips] = line[n - 1] "\n" $0
	}
	/^(ok  |\?   )\t/ { print; for (i = 1; i <= counts; i++) print count[i]; fflush(); n = counts = 0 }
	/^FAIL\t/ { for (i = 1; i <= n; i++) print line[i]; fflush(); n = 0 }
	END {
		for (i = 1; i <= n; i++) if (line[i] != "FAIL") print line[i]
		for (i = 1; i <= skips; i++) print skipped[i]
		if (skips) { print "gotest: " skips " tests were skipped, see above"; exit 1 }
	}'
awkstatus=$?
read -r gostatus <"$status" || gostatus=1
[ "$awkstatus" -eq 0 ] && [ "$gostatus" -eq 0 ]
