// Package golden keeps a pool that an earlier release wrote, and expects this one to read it: from the tier
// that a killed gateway left, and from the targets alone.
//
// testdata/pool-v1.tar.gz holds the directories targets/a, b and c, and tier, as the kill left them.
// An archive, because git keeps neither empty directories nor the zeroes of slots written ahead cheaply.
// It was made by `go test ./test/golden -update`; once released it is never made again, and a new format
// gets an archive of its own beside it.
package golden
