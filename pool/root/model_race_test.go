//go:build race

package root

// These are lower here: the race detector makes a schedule ten times as slow.
const (
	schedulesDefault     = 1500
	searchPercentDefault = 4
	twinStates           = 1500
)
