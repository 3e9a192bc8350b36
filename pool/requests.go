package pool

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"

	"graindisk/backend"
	"graindisk/pool/root"
)

// Requests counts what the targets were asked since the pool was opened, whatever came of it.
type Requests struct {
	ShardPuts   int64 `json:"shard_puts"`
	ShardReads  int64 `json:"shard_reads"` // of segments, to the last ranged read
	Root        int64 `json:"root"`
	Beat        int64 `json:"beat"`
	Checkpoints int64 `json:"checkpoints"` // parts, written and read
	Other       int64 `json:"other"`       // lists, deletions
}

// Total is all of them.
func (r Requests) Total() int64 {
	return r.ShardPuts + r.ShardReads + r.Root + r.Beat + r.Checkpoints + r.Other
}

func (r Requests) plus(o Requests) Requests {
	return Requests{
		ShardPuts: r.ShardPuts + o.ShardPuts, ShardReads: r.ShardReads + o.ShardReads, Root: r.Root + o.Root,
		Beat: r.Beat + o.Beat, Checkpoints: r.Checkpoints + o.Checkpoints, Other: r.Other + o.Other,
	}
}

// Requests counts by target, in the order of Options.Targets.
func (p *Pool) Requests() []Requests {
	out := make([]Requests, len(p.o.Targets))
	for i, t := range p.o.Targets {
		if c, ok := t.Store.(*countedStore); ok {
			out[i] = c.requests()
		}
	}
	return out
}

// countedStore counts the requests to a target by kind.
type countedStore struct {
	backend.Store
	puts, reads, root, beat, ckpt, other atomic.Int64
}

// countTargets puts a counter before every target.
func countTargets(ts []Target) []Target {
	out := make([]Target, len(ts))
	for i, t := range ts {
		t.Store = &countedStore{Store: t.Store}
		out[i] = t
	}
	return out
}

func (s *countedStore) requests() Requests {
	return Requests{
		ShardPuts: s.puts.Load(), ShardReads: s.reads.Load(), Root: s.root.Load(),
		Beat: s.beat.Load(), Checkpoints: s.ckpt.Load(), Other: s.other.Load(),
	}
}

// count adds a request for an object; of is what it is for a shard.
func (s *countedStore) count(key string, of *atomic.Int64) {
	switch {
	case strings.HasPrefix(key, "seg/"):
	case key == root.Key:
		of = &s.root
	case key == beatKey:
		of = &s.beat
	case strings.HasPrefix(key, "ckpt/"):
		of = &s.ckpt
	default:
		of = &s.other
	}
	of.Add(1)
}

// beatKey is the object that an owner rewrites while nothing else shows that it lives.
const beatKey = "beat"

func (s *countedStore) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	s.count(key, &s.puts)
	return s.Store.Put(ctx, key, body, c)
}

func (s *countedStore) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	s.count(key, &s.reads)
	return s.Store.Get(ctx, key, max)
}

func (s *countedStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if len(p) > 0 {
		s.count(key, &s.reads)
	}
	return s.Store.ReadAt(ctx, key, p, off)
}

func (s *countedStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	s.count(key, &s.other)
	return s.Store.Stat(ctx, key)
}

func (s *countedStore) Delete(ctx context.Context, key string) error {
	s.count(key, &s.other)
	return s.Store.Delete(ctx, key)
}

// Unwrap implements backend.Wrapper.
func (s *countedStore) Unwrap() backend.Store { return s.Store }

// DeleteBatch implements backend.BatchDeleter.
func (s *countedStore) DeleteBatch(ctx context.Context, keys []string) []error {
	b, ok := s.Store.(backend.BatchDeleter)
	if !ok || len(keys) == 0 {
		return backend.DeleteEach(ctx, s, keys)
	}
	s.count(keys[0], &s.other)
	return b.DeleteBatch(ctx, keys)
}

// CopyFrom implements backend.Copier, if the target's store does.
func (s *countedStore) CopyFrom(ctx context.Context, key string, from backend.Store, fromKey string, c backend.Cond) (string, error) {
	copier, ok := s.Store.(backend.Copier)
	if !ok {
		return "", &backend.Error{Op: "copy", Store: s.String(), Key: key, Class: backend.Permanent, Err: errors.ErrUnsupported}
	}
	s.count(key, &s.puts)
	return copier.CopyFrom(ctx, key, from, fromKey, c)
}

func (s *countedStore) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	s.other.Add(1)
	return s.Store.List(ctx, prefix, after, max)
}
