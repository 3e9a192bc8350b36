package pool

import "graindisk/grains/segment"

// belowStrength tells whether a segment has fewer shards to lose than the pool's profile says.
func belowStrength(i segment.Info, parity int) bool {
	stored := 0
	for _, t := range i.Targets {
		if t != 0 {
			stored++
		}
	}
	return stored-int(i.K) < parity
}
