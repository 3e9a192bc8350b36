package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/pool/root"
)

// scheduled is a target whose requests, and the replies to them, take effect when the scheduler says so.
// What befalls a request is drawn only then, so that the draws come in the scheduler's order.
type scheduled struct {
	*backendtest.Faulty
	sched *crashtest.Sched
}

func (s scheduled) pass(op, key string) func() {
	s.sched.Park(op + ":" + s.String() + " " + key)
	return func() { s.sched.Park("reply:" + s.String() + " " + op + " " + key) }
}

func (s scheduled) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	defer s.pass("put", key)()
	return s.Faulty.Put(ctx, key, body, c)
}

func (s scheduled) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	defer s.pass("get", key)()
	return s.Faulty.Get(ctx, key, max)
}

func (s scheduled) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	defer s.pass("read", key)()
	return s.Faulty.ReadAt(ctx, key, p, off)
}

func (s scheduled) Delete(ctx context.Context, key string) error {
	defer s.pass("delete", key)()
	return s.Faulty.Delete(ctx, key)
}

func (s scheduled) DeleteBatch(ctx context.Context, keys []string) []error {
	defer s.pass("delete", keys[0])()
	return s.Faulty.DeleteBatch(ctx, keys)
}

func (s scheduled) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	defer s.pass("list", prefix)()
	return s.Faulty.List(ctx, prefix, after, max)
}

// guarded is what is behind a target through all lives. It knows every name that was ever used, refuses
// to change an object or to use a name again (I4), and lets some requests arrive twice, the second time
// much later.
type guarded struct {
	*backendtest.Memory
	stats *crashStats

	mu     sync.Mutex
	rng    *rand.Rand
	used   map[string]uint32 // checksums
	gone   map[string]bool   // was deleted: a request that arrives late may bring it back, an orphan
	echoes []func()
	broken error // the first violation
}

func newGuarded(name string, seed uint64, stats *crashStats) *guarded {
	return &guarded{Memory: backendtest.NewMemory(name), stats: stats, rng: rand.New(rand.NewPCG(seed, 5)), used: map[string]uint32{}, gone: map[string]bool{}}
}

var errImmutable = errors.New("the object is immutable")

// mutable tells the names that may be put again.
func mutable(key string) bool { return key == "root" || key == "beat" }

func (g *guarded) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.echoLocked()
	if !mutable(key) {
		g.stats.inc("I4 puts checked")
		was, used := g.used[key]
		if !c.Absent || used && !g.has(key) && !(g.gone[key] && was == block.CRC(body)) {
			g.violatedLocked("I4: %s at %s was put again (absent: %v)", key, g, c.Absent)
			return "", &backend.Error{Op: "put", Store: g.String(), Key: key, Class: backend.Permanent, Err: errImmutable}
		}
	}
	echoes := g.rng.IntN(50) == 0
	etag, err := g.Memory.Put(ctx, key, body, c)
	if echoes && (err == nil || errors.Is(err, backend.ErrPrecondition)) { // of one whose caller had gone, there is no first time
		body := bytes.Clone(body) // it is the caller's, who uses it again
		g.echoes = append(g.echoes, func() {
			if _, err := g.Memory.Put(context.Background(), key, body, c); err == nil && !mutable(key) && !g.gone[key] {
				g.violatedLocked("I4: the echo of a put of %s took effect", key)
			}
		})
	}
	if err == nil {
		g.used[key] = block.CRC(body)
	}
	return etag, err
}

func (g *guarded) Delete(ctx context.Context, key string) error {
	g.stats.inc("I3 objects deleted")
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone[key] = true
	return g.Memory.Delete(ctx, key)
}

// DeleteBatch hides that of Memory, which would go past Delete.
func (g *guarded) DeleteBatch(ctx context.Context, keys []string) (errs []error) {
	for i, key := range keys {
		errs = backend.SetError(errs, len(keys), i, g.Delete(ctx, key))
	}
	return errs
}

// echoLocked lets a request of long ago arrive once more.
func (g *guarded) echoLocked() {
	if len(g.echoes) > 0 && g.rng.IntN(10) == 0 {
		g.stats.inc("requests that arrived twice")
		g.echoes[0]()
		g.echoes = g.echoes[1:]
	}
}

func (g *guarded) has(key string) bool {
	_, err := g.Memory.Stat(context.Background(), key)
	return err == nil
}

// root is the target's copy of the root.
func (g *guarded) root() []byte {
	b, _, _ := g.Memory.Get(context.Background(), root.Key, 1<<20)
	return b
}

func (g *guarded) violatedLocked(format string, args ...any) {
	if g.broken == nil {
		g.broken = fmt.Errorf(format, args...)
	}
}

func (g *guarded) violation() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.broken
}
