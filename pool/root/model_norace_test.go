//go:build !race

package root

const (
	schedulesDefault     = 20000
	searchPercentDefault = 100
)
