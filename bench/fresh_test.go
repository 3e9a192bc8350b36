package main

import (
	"strings"
	"testing"
)

func TestFreshRow(t *testing.T) {
	const out = "goos: linux\nBenchmarkFreshOpen-2   \t1\t12103170907 ns/op\t 6.600 MB\t 10.51 all-here-s\t 49.43 heap-MB\t 34.14 lookup-ms\t 1.027 open-s\t 275.0 requests\nPASS\n"
	r, err := freshRow(out)
	if err != nil || len(r.Values) != 1 || r.Values[0] != 1.027 || !strings.HasPrefix(r.Note, "275 requests, 6.6 MB, heap +49 MB; then 34 ms") {
		t.Errorf("%+v, %v", r, err)
	}
	for _, bad := range []string{"PASS\n", "BenchmarkFreshOpen-2 1 x ns/op\n", "BenchmarkFreshOpen-2\n"} {
		if r, err := freshRow(bad); err == nil {
			t.Errorf("%q: %+v", bad, r)
		}
	}
}
