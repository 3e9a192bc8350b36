package writeback

import (
	"fmt"
	"slices"

	"graindisk/tier"
)

// Pins keep the slots of blocks found by Lookup from changing hands. The zero value is ready; it
// must not be copied while it holds pins.
type Pins struct {
	space *tier.Space
	few   [4]int
	n     int
	more  []int
}

func (p *Pins) add(s *tier.Space, slot int) {
	for _, x := range p.few[:p.n] {
		if x == slot {
			return
		}
	}
	if slices.Contains(p.more, slot) {
		return
	}
	if !s.Pin(slot) { // Publish drops the index entries first, so this is our bug
		panic(fmt.Sprintf("writeback: %s changes hands with unpublished blocks", tier.Name(slot)))
	}
	p.space = s
	if p.n < len(p.few) {
		p.few[p.n] = slot
		p.n++
		return
	}
	p.more = append(p.more, slot)
}

// Release lets go of the slots. Pins may be used again.
func (p *Pins) Release() {
	for _, s := range p.few[:p.n] {
		p.space.Unpin(s)
	}
	for _, s := range p.more {
		p.space.Unpin(s)
	}
	p.n, p.more = 0, p.more[:0]
}
