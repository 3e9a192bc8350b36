package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"github.com/google/uuid"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/vfs"
)

// A gateway scrubs each of its pools in rounds of Options.ScrubPeriod. A round begins with the root and the
// checkpoints; then its segments follow in the order of their numbers, spread evenly over the time that is
// left, one at a time and at Options.ScrubRate at most; of a hundred segments and fewer each has a hundredth
// of it. Where it is, and what it has found, is kept in the file "scrub" on the tier, which is written now and
// then, and never synced: without it the round begins anew.
//
//	0      4     6   8          16     32        40    48     56                        80                         128   132
//	+------+-----+---+----------+------+---------+-----+------+-------------------------+--------------------------+-----+
//	| GDSP | ver | 0 | incompat | pool | started | end | next | segments objects bytes  | found: six of ScrubCounts | crc |
//	+------+-----+---+----------+------+---------+-----+------+-------------------------+--------------------------+-----+
//
// Integers are little-endian, times are seconds since 1970. started is that of the round, end that of the one
// before; next is the segment to go on with, 0 = the round has not begun. crc is CRC32C over all before it.
const (
	scrubFile    = "scrub"
	scrubMagic   = "GDSP"
	scrubVersion = 1
	scrubBytes   = 32 + 12*8 + 4
)

// scrubRound is where a round is.
type scrubRound struct {
	started, ended int64
	next           block.SegmentID
	segments       uint64
	objects, bytes int64
	found          ScrubCounts
}

func (r scrubRound) encode(pool [16]byte) []byte {
	le := binary.LittleEndian
	b := append(make([]byte, 0, scrubBytes), scrubMagic...)
	b = le.AppendUint16(b, scrubVersion)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, 0)
	b = append(b, pool[:]...)
	for _, v := range []int64{
		r.started, r.ended, int64(r.next), int64(r.segments), r.objects, r.bytes,
		r.found.Damaged, r.found.Missing, r.found.Repaired, r.found.Unrepairable, r.found.Unread, r.found.LostBytes,
	} {
		b = le.AppendUint64(b, uint64(v))
	}
	return le.AppendUint32(b, block.CRC(b))
}

// decodeScrubRound reads the position of a round of that pool. Errors match segment.ErrDamaged or segment.ErrNewer.
func decodeScrubRound(b []byte, pool [16]byte) (r scrubRound, err error) {
	le := binary.LittleEndian
	if len(b) < 16 || string(b[:4]) != scrubMagic {
		return r, fmt.Errorf("scrub position of %d bytes: %w", len(b), segment.ErrDamaged)
	}
	if v, inc := le.Uint16(b[4:]), le.Uint64(b[8:]); v > scrubVersion || inc != 0 {
		return r, fmt.Errorf("scrub position: version %d, incompat bits %#x: %w", v, inc, segment.ErrNewer)
	}
	if len(b) != scrubBytes || le.Uint16(b[4:]) == 0 || block.CRC(b[:scrubBytes-4]) != le.Uint32(b[scrubBytes-4:]) {
		return r, fmt.Errorf("scrub position of %d bytes: bad length or checksum: %w", len(b), segment.ErrDamaged)
	}
	if [16]byte(b[16:32]) != pool {
		return r, fmt.Errorf("scrub position of pool %x: %w", b[16:32], segment.ErrDamaged)
	}
	var v [12]int64
	for i := range v {
		if v[i] = int64(le.Uint64(b[32+8*i:])); v[i] < 0 {
			return r, fmt.Errorf("scrub position: field %d is %d: %w", i, v[i], segment.ErrDamaged)
		}
	}
	if v[2] >= int64(block.SegmentMax) {
		return r, fmt.Errorf("scrub position: segment %d: %w", v[2], segment.ErrDamaged)
	}
	return scrubRound{
		started: v[0], ended: v[1], next: block.SegmentID(v[2]), segments: uint64(v[3]), objects: v[4], bytes: v[5],
		found: ScrubCounts{Damaged: v[6], Missing: v[7], Repaired: v[8], Unrepairable: v[9], Unread: v[10], LostBytes: v[11]},
	}, nil
}

// DescribeScrub prints the position of a scrub, the file "scrub" of a pool on the tier.
func DescribeScrub(w io.Writer, b []byte) error {
	if len(b) < 32 {
		return fmt.Errorf("scrub position of %d bytes: %w", len(b), segment.ErrDamaged)
	}
	r, err := decodeScrubRound(b, [16]byte(b[16:32]))
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "scrub        of pool %s\n", uuid.UUID(b[16:32]))
	fmt.Fprintf(w, "round        since %s, goes on with segment %d; the one before ended %s\n", stamp(r.started), r.next, stamp(r.ended))
	fmt.Fprintf(w, "read         %d segments, %d objects, %d bytes\n", r.segments, r.objects, r.bytes)
	_, err = fmt.Fprintf(w, "found        damaged %d, missing %d, repaired %d, unrepairable %d, unread %d, lost bytes %d\n",
		r.found.Damaged, r.found.Missing, r.found.Repaired, r.found.Unrepairable, r.found.Unread, r.found.LostBytes)
	return err
}

func stamp(seconds int64) string {
	if seconds == 0 {
		return "never"
	}
	return time.Unix(seconds, 0).UTC().Format(time.RFC3339)
}

// loadRound reads the position from the tier; a new round begins if there is none.
func (p *Pool) loadRound() scrubRound {
	b, err := readSmall(p.o.FS, path.Join(p.o.TierDir, scrubFile), scrubBytes)
	var r scrubRound
	if err == nil {
		r, err = decodeScrubRound(b, p.uuid)
	}
	if err != nil {
		p.o.Log.Debug("scrub begins anew", "pool", p.o.Name, "why", err)
		return scrubRound{}
	}
	return r
}

func readSmall(fs vfs.FS, name string, max int) ([]byte, error) {
	f, err := fs.Open(name)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	b := make([]byte, min(size, int64(max)+1))
	if err == nil {
		_, err = f.ReadAt(b, 0)
	}
	return b, errors.Join(err, f.Close())
}

// saveRound keeps the position; without it no more is lost than the time of a round.
func (p *Pool) saveRound(r scrubRound) {
	name := path.Join(p.o.TierDir, scrubFile)
	err := func() error {
		f, err := p.o.FS.Create(name + ".new")
		if err != nil {
			return err
		}
		_, err = f.WriteAt(r.encode(p.uuid), 0)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		return p.o.FS.Rename(name+".new", name)
	}()
	if err != nil {
		p.o.Log.Debug("position of the scrub not kept", "pool", p.o.Name, "err", err)
	}
}

// How a round goes on. [tune]
const (
	scrubRestMin  = time.Second // between two stripes of a round
	scrubSaveGap  = time.Minute // between writings of the position
	scrubFirst    = time.Minute // after an open
	scrubRateUsed = 32 << 20    // default of Options.ScrubRate
)

// scrubRounds scrubs round after round until ctx ends.
func (p *Pool) scrubRounds(ctx context.Context) {
	r := p.loadRound()
	if !pause(ctx, min(scrubFirst, p.o.ScrubPeriod/100)) {
		return
	}
	saved := time.Now()
	save := func(always bool) {
		p.scrubs.mu.Lock()
		p.scrubs.round = r
		p.scrubs.mu.Unlock()
		if always || time.Since(saved) >= scrubSaveGap {
			saved = time.Now()
			p.saveRound(r)
		}
	}
	defer save(true)
	for ctx.Err() == nil {
		now := time.Now()
		end := time.Unix(r.started, 0).Add(p.o.ScrubPeriod)
		left := p.segmentsFrom(r.next)
		switch {
		case r.started > now.Unix(): // the clock was set back
			r.started = now.Unix()
		case r.next == 0 && now.Before(end): // the round before is done
			pause(ctx, min(end.Sub(now), time.Hour))
			continue
		case !p.isClaimed():
			pause(ctx, scrubFirst)
			continue
		case r.next == 0:
			next := scrubRound{started: now.Unix(), ended: r.ended, next: 1}
			p.roundStep(ctx, &next, func(ctx context.Context, s *scrubber) error { return s.begin(ctx) })
			if ctx.Err() == nil {
				r = next
				save(true)
			}
			continue
		case len(left) == 0:
			r.ended, r.next = now.Unix(), 0
			save(true)
			p.o.Log.Info("scrub round ended", "pool", p.o.Name, "segments", r.segments, "bytes", r.bytes, "damaged", r.found.Damaged,
				"missing", r.found.Missing, "repaired", r.found.Repaired, "unread", r.found.Unread, "lost_bytes", r.found.LostBytes)
			continue
		}
		p.roundStep(ctx, &r, func(ctx context.Context, s *scrubber) error {
			return s.segment(ctx, left[0])
		})
		if ctx.Err() != nil {
			return
		}
		r.next = left[0] + 1
		save(false)
		rest := min(end.Sub(now)/time.Duration(len(left)+1), p.o.ScrubPeriod/100) - time.Since(now)
		pause(ctx, max(rest, min(scrubRestMin, p.o.ScrubPeriod/1e6)))
	}
}

// roundStep runs one step of a round, when no other scrub runs, and adds what it has found.
func (p *Pool) roundStep(ctx context.Context, r *scrubRound, f func(context.Context, *scrubber) error) {
	s := p.newScrubber(ScrubOptions{BytesPerSecond: p.o.ScrubRate})
	if err := p.scrubbing(ctx, s, func(ctx context.Context) error { return f(ctx, s) }); err != nil {
		return // with ctx
	}
	rep := s.report()
	r.segments += uint64(rep.Segments)
	r.objects += rep.Objects
	r.bytes += rep.Bytes
	r.found.add(rep.ScrubCounts)
}
