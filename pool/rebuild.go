package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
)

// Rebuilding makes a pool's root and maps anew from its shards alone, for when the root is lost: no target holds
// a readable copy of it. Checkpoints are not used, should there be any.
//
//	list seg/ of all targets ─► a trailer of each segment ─► the cut records ─► the chain ─► maps ─► checkpoint ─► root
//
// Which cut. A cut's record is sealed only when the cut before it is committed, and a tenure (an epoch) seals one
// record after the other. So of all records that can be read, that of the highest epoch, and in it the highest
// cut, is the newest thing any owner did:
//
//	epoch 3   1 ── 2 ── 3 ── 4?          4 of epoch 3 was never committed: epoch 5, the newer, found 3
//	                    │
//	epoch 5             └─── 4 ── 5 ── 6?      6: every shard it needs is there? then 6, else 5
//
// The cut before the newest record is committed, and so is all it leads back to, by number and checksum. Any
// other record that is not on this way back is an orphan: its owner was fenced before it committed. The newest
// cut itself may have been committed or not; it is taken if all of its segments are there, with k shards or
// more, because a committed one is never incomplete but by loss, and an uncommitted one is a prefix of what
// its owner acknowledged. If it is incomplete the one before it is taken, never a fork of that by an older epoch.
// Epochs that left no record say nothing: what they found may have been any of these, and they published nothing.
// (Of two records of one epoch and cut, which a fenced owner's last try may leave, the higher segment number
// is the later tenure's: a tenure starts above all numbers that those before it could use.)
//
// Which segments. Along the chain everything must be there but what the newest Gone names (DESIGN section 6).
// A segment counts as there with k shards of the right length; that their bytes are right is for scrub to see. If
// something else is missing, nothing is restored by itself: the error says what, and which is the newest
// cut that is whole, and a second call may ask for that one.
//
// Where. A shard is where it was found, so targets may have been renamed, swapped or replaced. A target keeps its
// number if most of what it holds was planned for that, else it gets a new one.
//
// Memory: 480 bytes per segment as measured (16 MB for 1 TiB), the rows of records, and the maps as of a pool that is
// open; indexes are read ahead, rebuildAhead at a time, and held until those of their cut are in the maps (48 bytes per
// extent of one cut, as for any owner that reads a cut back). The maps' runs are files in Scratch meanwhile.
//
// The new root has the pool's uuid, new members, an epoch above every one seen, segment numbers above every one
// that may still be written by an owner that does not know yet, and is released. It is put only where there is
// none, after the checkpoint it names. A crash before that leaves objects that nothing names; one while the
// copies are being put is finished by the next call.

// RebuildOptions say how to rebuild.
type RebuildOptions struct {
	Cut     uint64 // as of this cut; 0 = the newest
	DryRun  bool   // look and report, write nothing
	Scratch string // a folder of Options.FS for the maps meanwhile; default TierDir with ".rebuild"; emptied before and after
	// Progress is called now and then, by one goroutine at a time; nil = nobody is told.
	Progress func(RebuildProgress)
}

// RebuildProgress tells how far a rebuild has come.
type RebuildProgress struct {
	Phase string // "list" and "read" segments, "apply" them, "write" the result
	Done  int    // segments
	Total int    // 0 = not known
}

// RebuildReport is what was, or would be, restored.
type RebuildReport struct {
	Name     string          `json:"name"`
	UUID     string          `json:"uuid"`
	Restored bool            `json:"restored"` // false: nothing was written
	Cut      uint64          `json:"cut"`
	CutEpoch uint64          `json:"cut_epoch"` // of the owner that wrote it
	CutTime  time.Time       `json:"cut_time"`
	Epoch    uint64          `json:"epoch"` // of the new root
	Stripe   string          `json:"stripe"`
	Disks    []RebuiltDisk   `json:"disks"` // by name
	Targets  []RebuiltTarget `json:"targets"`
	Segments int             `json:"segments"` // that the disks are in
	Cuts     int             `json:"cuts"`     // whose records are needed
	// BelowStrength of these segments lack shards, until they are repaired.
	BelowStrength    int `json:"segments_below_strength"`
	UnreadableShards int `json:"unreadable_shards"` // that were met; few are read
	OtherSegments    int `json:"other_segments"`    // found and not needed: orphans, and what is gone but not deleted yet
	// Notes are what a person should know: a newer cut that is incomplete, a root that was half made.
	Notes []string `json:"notes,omitempty"`
}

// RebuiltDisk is a disk as it comes back.
type RebuiltDisk struct {
	Name      string `json:"name"`
	ID        uint32 `json:"id"`
	SizeBytes uint64 `json:"size_bytes"`
}

// RebuiltTarget is where shards were found.
type RebuiltTarget struct {
	Name   string `json:"name"`
	ID     uint16 `json:"id"`
	Shards int    `json:"shards"` // of needed segments
	New    bool   `json:"new"`    // nothing there was planned for a target of one number: empty, or mixed
	// Witness: it gets a copy of the root and no shards, as configured. One on which shards were found is none.
	Witness bool `json:"witness,omitempty"`
}

// What a rebuild leaves room for above all it saw: numbers that an owner who still runs may use, and epochs of
// tenures that left no object.
const (
	rebuildNumbers = 2 * segReserve
	rebuildEpochs  = 64
)

// Rebuild makes the root of a pool anew from its shards. It refuses with root.ErrExists if any target holds a
// root, and as long as a target does not answer; with ErrNoPool if there is no complete cut; with
// segment.ErrDamaged if something is lost that the cut needs. The report is not nil once the cut is chosen, also with
// an error. Nobody may open the pool meanwhile.
func Rebuild(ctx context.Context, o Options, ro RebuildOptions) (*RebuildReport, error) {
	o = o.withDefaults()
	o.BootBytes = -1
	if ro.Scratch == "" {
		ro.Scratch = o.TierDir + ".rebuild"
	}
	if ro.Progress == nil {
		ro.Progress = func(RebuildProgress) {}
	}
	rep, err := (&rebuilder{o: o, ro: ro}).run(ctx)
	if err != nil {
		return rep, fmt.Errorf("rebuild pool %s: %w", o.Name, err)
	}
	return rep, nil
}

type rebuilder struct {
	o      Options
	ro     RebuildOptions
	s      *survey
	top    uint64 // epoch of the new root
	stripe root.Stripe
	rep    *RebuildReport
}

func (b *rebuilder) run(ctx context.Context) (*RebuildReport, error) {
	if err := b.o.validate(); err != nil {
		return nil, err
	}
	begun, err := b.lookForRoot(ctx)
	if err != nil {
		return nil, err
	}
	if begun != nil {
		return b.finish(ctx, begun)
	}
	if b.s, err = surveyShards(ctx, b.o, b.ro.Progress); err != nil {
		return nil, err
	}
	h := newHistory(b.s)
	chain, notes, err := h.choose(b.ro.Cut)
	if err != nil {
		return nil, err
	}
	b.describe(h, chain, notes)
	if b.ro.DryRun {
		return b.rep, nil
	}
	return b.rep, b.restore(ctx, h, chain)
}

// lookForRoot refuses to go on where there is a root, but for one whose making was cut short.
func (b *rebuilder) lookForRoot(ctx context.Context) (*root.Copy, error) {
	var begun *root.Copy
	err := patiently(ctx, func(ctx context.Context) (err error) {
		begun, err = root.Unfinished(ctx, rootTargets(b.o.Targets))
		return err
	})
	switch {
	case err == nil || ctx.Err() != nil:
		return begun, err
	case errors.Is(err, root.ErrExists):
		return nil, fmt.Errorf("%w; the pool is not lost while its root can be read by a majority: open it (with --takeover, if it is held); only if no majority of its copies is left, delete what the others hold under %q and try again", err, root.Key)
	}
	return nil, fmt.Errorf("%w; every target must answer, since it may hold the root: take one that is gone for good out of the configuration", err)
}

// finish puts the copies that a rebuild before did not get to put.
func (b *rebuilder) finish(ctx context.Context, c *root.Copy) (*RebuildReport, error) {
	v := c.Val
	rep := &RebuildReport{
		Name: b.o.Name, UUID: c.Pool, Cut: v.Cut, Epoch: c.Accepted.Epoch, Stripe: stripeName(v.Stripe),
		Notes: []string{fmt.Sprintf("a rebuild before wrote all but some copies of the root, as of cut %d; that one is finished, whatever cut is asked for", v.Cut)},
	}
	for _, m := range v.Cfg.Members {
		rep.Targets = append(rep.Targets, RebuiltTarget{Name: m.Name, ID: uint16(m.ID)})
	}
	if b.ro.DryRun {
		return rep, nil
	}
	err := root.Recreate(ctx, rootTargets(b.o.Targets), c.Pool, v, c.Accepted)
	rep.Restored = err == nil
	return rep, err
}

// describe fills in the report by the chain, oldest cut first, and gives every segment its targets.
func (b *rebuilder) describe(h *cutHistory, chain []*rebuildCut, notes []string) {
	tip := chain[len(chain)-1]
	b.top = b.s.epoch + rebuildEpochs
	var segs []*foundSegment
	h.needed(chain, func(_ *rebuildCut, needs []*foundSegment) { segs = append(segs, needs...) })
	b.rep = &RebuildReport{
		Name: b.o.Name, UUID: uuid.UUID(b.s.pool).String(), Cut: tip.cut, CutEpoch: tip.epoch, CutTime: time.Unix(tip.time, 0).UTC(),
		Epoch: b.top, Cuts: len(chain), Segments: len(segs), OtherSegments: len(b.s.segs) - len(segs),
		Targets: b.s.place(segs), UnreadableShards: b.s.unreadable, Notes: notes,
	}
	b.stripe = root.Stripe{Data: b.o.Data, Parity: b.o.Parity}
	for _, f := range segs {
		i := f.info
		if i.PayloadBytes >= smallBytes && (int(i.K) > b.stripe.Data || int(i.K) == b.stripe.Data && int(i.M) > b.stripe.Parity) {
			b.stripe = root.Stripe{Data: int(i.K), Parity: int(i.M)}
		}
	}
	b.rep.Stripe = stripeName(b.stripe)
	for _, f := range segs {
		if belowStrength(f.info, b.stripe.Parity) {
			b.rep.BelowStrength++
		}
	}
	rows := map[block.DiskID]segment.DiskMeta{}
	for _, c := range chain {
		for i, d := range c.disks {
			rows[d] = c.rows[i]
		}
	}
	for d, m := range rows {
		if m.Flags&segment.DiskDeleted == 0 {
			b.rep.Disks = append(b.rep.Disks, RebuiltDisk{Name: m.Name, ID: uint32(d), SizeBytes: m.SizeBytes})
		}
	}
	slices.SortFunc(b.rep.Disks, func(x, y RebuiltDisk) int { return strings.Compare(x.Name, y.Name) })
}

func stripeName(s root.Stripe) string { return fmt.Sprintf("%d+%d", s.Data, s.Parity) }

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
