//go:build race

package pool

// crashHistories is lower here: the race detector makes a history ten times as slow.
const crashHistories = 8
