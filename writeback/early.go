package writeback

import (
	"graindisk/block"
	"graindisk/tier"
)

// early tells when it pays to have the device begin with a batch before its sync: when one is about to
// come for it. Then the device works while the client is told of its writes and thinks of its FLUSH, which
// has that much less to wait for:
//
//	write ─ answer ─ … FLUSH ─ fdatasync: data ─── cache flush ─ answer
//	write ─ answer ─ … FLUSH ─ fdatasync: cache flush ─ answer
//	           └ data ───┘
//
// Otherwise it would cost a request for each batch, where the kernel writes many at once. It is a hint:
// what is stable is decided by syncs alone. Log.mu guards it.
type early struct {
	since  int        // batches written since the last round of syncing began
	on     bool       // few of them came between the rounds before
	at     tier.Place // what to begin with: so many blocks from there on
	blocks uint32
}

// earlyMost is how many batches between two syncs are few. [tune]
const earlyMost = 4

// wrote notes a batch that was written.
func (e *early) wrote(at tier.Place, blocks uint32) {
	e.since++
	switch {
	case e.since > earlyMost:
		e.blocks = 0
	case !e.on:
	case e.blocks > 0 && e.at+tier.Place(e.blocks) == at:
		e.blocks += blocks
	default:
		e.at, e.blocks = at, blocks
	}
}

// syncs notes that a round of syncing begins, which needs no hint any more.
func (e *early) syncs() {
	e.on, e.since, e.blocks = e.since <= earlyMost, 0, 0
}

// BeginSync has the device begin with what was written last, if a Sync is likely to come for it soon; it does
// not wait. It is for the moment after a client was told that its writes are done, and only a hint.
func (l *Log) BeginSync() {
	l.mu.Lock()
	at, n := l.early.at, l.early.blocks
	l.early.blocks = 0
	l.mu.Unlock()
	if n > 0 {
		l.space.Start(at, int64(n)*block.Size)
	}
}
