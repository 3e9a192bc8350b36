//go:build race

package root

// schedulesDefault is lower here: the race detector makes a schedule ten times as slow.
const schedulesDefault = 1500
