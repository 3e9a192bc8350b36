package cache

import (
	"fmt"
	"io"

	"graindisk/block"
)

// Describe writes what a slot's saved index says, for people: the head, then one line per entry. What
// could be decoded is written even if the rest could not. Errors match ErrCorrupt or ErrNewer.
func Describe(w io.Writer, saved []byte) error {
	h, err := decodeHead(saved)
	if err != nil {
		return err
	}
	queue := "small"
	if h.kept {
		queue = "main"
	}
	fmt.Fprintf(w, "slot         %d of %d blocks, %s queue, age %d, stamp %016x\n", h.slot, h.slotBlocks, queue, h.age, h.stamp)
	fmt.Fprintf(w, "entries      %d, %d bytes\n", h.entries, h.body)
	_, err = decodeSaved(saved, func(id block.ExtentID, disk uint8, r run, _ []byte) {
		fmt.Fprintf(w, "extent       %v blocks %d-%d at block %d, disk %d mod 256\n", id, r.off, r.off+r.blocks-1, r.place.Block(), disk)
	})
	return err
}
