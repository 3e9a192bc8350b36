package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"graindisk/backend"
	"graindisk/pool/root"
)

// A Beat is what an owner says of itself in the object "beat" at one target, while it commits nothing: that it
// lives, and what would be lost with it. It serves messages; who owns the pool, the root alone decides.
type Beat struct {
	Pool  string `json:"pool"` // uuid
	Log   string `json:"log"`  // uuid of the owner's log
	Host  string `json:"host"`
	Epoch uint64 `json:"epoch"`
	Seq   uint64 `json:"seq"` // rises with each beat of a process
	Cut   uint64 `json:"cut"` // the newest published one
	// DirtyBytes are unpublished, the oldest of them since OldestAgeSeconds.
	DirtyBytes       int64     `json:"dirty_bytes"`
	OldestAgeSeconds float64   `json:"oldest_age_seconds"`
	EverySeconds     float64   `json:"every_seconds"` // at least so often there is a beat or a commit
	Time             time.Time `json:"time"`          // by the owner's clock, for people
}

const (
	beatMagic    = "graindisk beat"
	beatFormat   = 1
	beatBytesMax = 4 << 10
	// beatPatience is how long one target is asked to take a beat.
	beatPatience = 10 * time.Second
)

func (b *Beat) encode() ([]byte, error) { return seal(beatMagic, beatFormat, b) }

// DecodeBeat reads the body of a beat.
func DecodeBeat(body []byte) (*Beat, error) {
	if len(body) > beatBytesMax {
		return nil, fmt.Errorf("beat of %d bytes, at most %d: %w", len(body), beatBytesMax, errSealBroken)
	}
	b := new(Beat)
	if err := unseal(beatMagic, beatFormat, body, b); err != nil {
		return nil, err
	}
	if b.Pool == "" || b.Log == "" || b.Epoch == 0 {
		return nil, fmt.Errorf("beat of pool %q by log %q in epoch %d: %w", b.Pool, b.Log, b.Epoch, errSealBroken)
	}
	return b, nil
}

// DescribeBeat prints a beat for people.
func DescribeBeat(w io.Writer, body []byte) error {
	b, err := DecodeBeat(body)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "beat         %d of epoch %d, pool %s\nowner        log %s on %q, %s by its clock, every %g s at least\npublished    cut %d\nunpublished  %d bytes, oldest %.1f s\n",
		b.Seq, b.Epoch, b.Pool, b.Log, b.Host, b.Time.UTC().Format(time.RFC3339), b.EverySeconds, b.Cut, b.DirtyBytes, b.OldestAgeSeconds)
	return err
}

// newer tells whether b came after o, which may be nil.
func (b *Beat) newer(o *Beat) bool {
	return o == nil || b.Epoch > o.Epoch || b.Epoch == o.Epoch && b.Seq > o.Seq
}

// readBeat reads the beat at a target; nil if there is none that can be read. The ETag is that of what is there, empty
// if nothing is. It fails if the target does not answer.
func readBeat(ctx context.Context, s backend.Store) (*Beat, string, error) {
	body, etag, err := s.Get(ctx, beatKey, beatBytesMax)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return nil, "", nil
	case err != nil:
		return nil, "", err
	}
	b, err := DecodeBeat(body)
	if err != nil {
		return nil, etag, nil // who wrote it must not keep us from writing ours
	}
	return b, etag, nil
}

// beater rewrites the beat. It is used by one goroutine.
type beater struct {
	targets []Target                                 // in the order in which they are tried
	every   time.Duration                            // between signs of life
	signed  func() time.Time                         // when something was last committed; zero: never
	compose func(seq uint64) (b *Beat, mayBeat bool) // what there is to say now
	rival   func(*Beat)                              // a later epoch's beat was met
	beaten  func(*Beat)                              // one is written

	at   int    // the target that took the last one
	etag string // of that; empty: to be read
	seq  uint64
}

// run writes a beat at once and then whenever there was no sign of life for as long as every, until ctx ends. So
// between two signs there is never more than every and the time that a target takes. A beat that no
// target takes is tried again after as long.
func (b *beater) run(ctx context.Context, log func(error)) {
	last, first, failing := time.Time{}, true, false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if s := b.signed(); s.After(last) {
			last = s
		}
		wait := b.every - time.Since(last)
		if first || wait <= 0 {
			last, wait = time.Now(), b.every
			if text, ok := b.compose(b.seq + 1); ok {
				first = false
				err := b.put(ctx, text)
				if err != nil && ctx.Err() == nil && !failing {
					log(err)
				}
				failing = err != nil
			}
		}
		timer.Reset(wait)
	}
}

// put writes the beat at the first target that takes it, the one of last time first. It overwrites only what it has
// seen: so the beat of a later owner stays, and is told of.
func (b *beater) put(ctx context.Context, text *Beat) error {
	b.seq = text.Seq
	body, err := text.encode()
	if err != nil {
		return err
	}
	var errs []error
	for i := range b.targets {
		at := (b.at + i) % len(b.targets)
		if i > 0 {
			b.etag = ""
		}
		err := b.putAt(ctx, at, text, body)
		if err == nil {
			b.at = at
			b.beaten(text)
			return nil
		}
		if errors.Is(err, errRival) || ctx.Err() != nil {
			return err
		}
		errs = append(errs, fmt.Errorf("target %s: %w", b.targets[at].Name, err))
	}
	b.etag = ""
	return errors.Join(errs...)
}

// errRival means that a target holds the beat of a later epoch.
var errRival = errors.New("a later owner of the pool beats")

func (b *beater) putAt(ctx context.Context, at int, text *Beat, body []byte) (err error) {
	ctx, cancel := context.WithTimeout(ctx, min(beatPatience, max(b.every, time.Second)))
	defer cancel()
	store := b.targets[at].Store
	for range 2 { // the second time if what is there is not what was
		etag := b.etag
		b.etag = ""
		if etag == "" {
			var there *Beat
			if there, etag, err = readBeat(ctx, store); err != nil {
				return err
			}
			if there != nil && there.Pool == text.Pool && there.Epoch > text.Epoch {
				b.rival(there)
				return fmt.Errorf("%w: epoch %d on %s", errRival, there.Epoch, there.Host)
			}
		}
		etag, err = store.Put(ctx, beatKey, body, backend.Cond{Match: etag, Absent: etag == ""})
		if err == nil {
			b.etag = etag
			return nil
		}
		if !errors.Is(err, backend.ErrPrecondition) {
			return err
		}
	}
	return err
}

// keepBeating writes the pool's beat until ctx ends.
func (p *Pool) keepBeating(ctx context.Context) {
	b := &beater{
		targets: p.o.Targets, every: p.o.Beat,
		signed: func() time.Time {
			if t := p.committed.Load(); t != nil {
				return *t
			}
			return time.Time{}
		},
		compose: p.composeBeat,
		rival: func(r *Beat) {
			p.o.Log.Warn("a later owner of the pool beats; replies are held back until the root has been read",
				"pool", p.o.Name, "host", r.Host, "epoch", r.Epoch)
			p.pulse.doubt()
		},
		beaten: func(b *Beat) { p.lastBeat.Store(b) },
	}
	b.run(ctx, func(err error) {
		p.o.Log.Warn("no target takes the beat; it is tried again", "pool", p.o.Name, "err", err)
	})
}

// composeBeat is what this owner has to say; nothing before it has claimed the pool, and after it has stopped.
func (p *Pool) composeBeat(seq uint64) (*Beat, bool) {
	if !p.isClaimed() || p.broken.Load() != nil {
		return nil, false
	}
	u, v := p.log.Unpublished(), p.value()
	return &Beat{
		Pool: p.uuid.String(), Log: p.logID.String(), Host: p.o.Host, Epoch: p.epoch.Load(), Seq: seq, Cut: v.Cut,
		DirtyBytes: u.Bytes, OldestAgeSeconds: age(u), EverySeconds: p.o.Beat.Seconds(), Time: time.Now().UTC(),
	}, v.State == root.Held
}
