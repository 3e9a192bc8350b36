//go:build !race

package root

const (
	schedulesDefault     = 8000
	searchPercentDefault = 100
	twinStates           = 4000
)
