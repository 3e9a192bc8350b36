package pool

import (
	"context"
	"sync"
	"time"
)

// localPoll is how often keepLocal looks at the length of the metadata log.
const localPoll = time.Second

// keepLocal writes local checkpoints between cuts, until ctx ends. A cut writes one when the metadata
// log is long; while the targets are away there is no cut, and what a reopen has to replay would grow with
// the outage. The checkpoint holds the index of all that is unpublished, so it is not worth writing before
// the metadata log is a good part of that.
func (p *Pool) keepLocal(ctx context.Context) {
	tick := time.NewTicker(localPoll)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		index := p.log.IndexBytes()
		p.cache.CountBeside(index)
		if p.log.MetaBytes() < max(p.o.CheckpointBytes*3/2, index/2) {
			continue
		}
		err := p.checkpointHere(ctx)
		if err != nil && ctx.Err() == nil && p.log.Failed() == nil && !failing {
			p.o.Log.Warn("local checkpoint not written; the one before holds", "pool", p.o.Name, "err", err)
		}
		failing = err != nil
	}
}

// checkpointHere writes a local checkpoint that ends no cut.
func (p *Pool) checkpointHere(ctx context.Context) error {
	p.localMu.Lock()
	defer p.localMu.Unlock()
	p.mapsMu.Lock()
	unlock := sync.OnceFunc(p.mapsMu.Unlock)
	defer unlock()
	var v mapsView
	defer func() { v.release() }()
	err := p.log.Checkpoint(ctx, func() ([]byte, error) {
		defer unlock()
		v = p.mapsNow()
		return p.encodeState(v)
	})
	p.keepRuns(v, err)
	return err
}

// keepRuns keeps the files that the local checkpoint of these maps names, beside those of the one before
// if the writing failed.
func (p *Pool) keepRuns(v mapsView, err error) { p.runs.Keep(v.runs(), err != nil) }
