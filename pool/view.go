package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/pool/root"
	"graindisk/vdisk"
)

// A View shows the disks of a pool as of one published cut, from the targets alone: without a tier, without a
// claim, and without a request that writes. Whoever owns the pool goes on meanwhile and is not in the way.
//
//	root copies ──► newest value ──► checkpoint: disks, segments, runs of maps ─┐
//	                        └──────► records of the cuts since ─────────────────┴─► map of one disk ──► segments
//
// What is read is the cut of the value, never a mixture: maps and segments do not change, and an owner deletes only
// what no cut from there on needs, after a grace. A segment that is gone makes the view read the root again: if that
// has gone on, the error is ErrViewExpired, else damage.
//
// With a quorum of root copies nothing newer was committed when the view was opened. That does not say that its cut
// was: a copy may be of a commit under way, or of one that never came to its end (Committed). Either way it is a
// prefix of what was acknowledged, whose segments were all stored before. All methods are safe for concurrent use.
type View struct {
	o    ViewOptions
	p    *Pool // as much of one as reading takes: targets, root and segments
	info ViewInfo

	at       root.Value
	disks    map[block.DiskID]viewedDisk
	segments map[block.SegmentID]segment.Info
	cuts     []viewedCut // since the checkpoint

	mu       sync.Mutex
	degraded map[shardID]bool
}

// ErrViewExpired means that the pool went on and has reclaimed what the cut of a view needs: open another one.
var ErrViewExpired = errors.New("the pool has gone on and no longer keeps what this cut needs")

// ViewOptions configure a View. A zero field has the default that its comment names.
type ViewOptions struct {
	Name    string   // for messages
	Targets []Target // only read; those that are lost may be left out
	// Minority takes the newest copy of the root that is to be had where there are too few to be sure of it.
	Minority bool
	// IndexBytes bounds the cached indexes of segments in RAM; default 256 MiB.
	IndexBytes int64
	// Patience is how long a read asks again while too few targets answer; default 1 min.
	Patience time.Duration
	Log      *slog.Logger
}

// ViewInfo says what a View shows.
type ViewInfo struct {
	Pool      string    `json:"pool"`
	UUID      string    `json:"uuid"`
	Epoch     uint64    `json:"epoch"`
	Cut       uint64    `json:"cut"`  // 0 before the first
	Time      time.Time `json:"time"` // of the cut, to the second; of the checkpoint if nothing was published since
	State     string    `json:"state"`
	OwnerName string    `json:"owner_name,omitempty"` // host that has or had the pool
	// Copies of the root that were read, of so many members. Without Quorum newer cuts may have been published;
	// without Committed this one may not have been.
	Copies    int  `json:"root_copies"`
	Members   int  `json:"root_members"`
	Quorum    bool `json:"quorum"`
	Committed bool `json:"committed"`
}

// ViewedDisk describes a disk of a View.
type ViewedDisk struct {
	Name      string `json:"name"`
	ID        uint32 `json:"id"`
	SizeBytes int64  `json:"size_bytes"`
}

// viewedDisk is a row of the disk table, and its map as of the checkpoint.
type viewedDisk struct {
	meta segment.DiskMeta
	runs []runRef
}

// viewedCut is a cut since the checkpoint.
type viewedCut struct {
	rec   *segment.CutRecord
	infos []segment.Info
}

type shardID struct {
	segment block.SegmentID
	shard   int
}

const (
	viewTries    = 3                      // openings while the pool goes on and deletes checkpoints
	viewSettle   = 5                      // readings of a root whose newest value is not seen to be committed,
	viewSettleIn = 300 * time.Millisecond // and the time between
	viewAtOnce   = 16                     // cut records and indexes read side by side
)

// OpenView reads the root, the checkpoint's table and the records of the cuts since. It fails with ErrNoPool if no
// target holds a root, root.ErrNoQuorum if too few copies can be read, root.ErrNewer or segment.ErrNewer if a newer
// release wrote what it needs, segment.ErrDamaged if that is lost.
func OpenView(ctx context.Context, o ViewOptions) (*View, error) {
	o.IndexBytes = cmp.Or(o.IndexBytes, 256<<20)
	o.Patience = cmp.Or(o.Patience, time.Minute)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	for try := 1; ; try++ {
		v, err := openView(ctx, o)
		if err == nil {
			return v, nil
		}
		if !errors.Is(err, ErrViewExpired) || try == viewTries || ctx.Err() != nil {
			return nil, fmt.Errorf("read pool %s: %w", o.Name, err)
		}
	}
}

func openView(ctx context.Context, o ViewOptions) (*View, error) {
	v := &View{o: o, degraded: map[shardID]bool{}}
	p := newMaps(Options{Name: o.Name, Log: o.Log})
	for _, t := range o.Targets {
		p.o.Targets = append(p.o.Targets, Target{Name: t.Name, Store: readOnlyStore{t.Store}, Witness: t.Witness})
	}
	p.forget() // as empty as an open finds it
	v.p = p
	seen, err := v.readRoot(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.mapTargets(seen); err != nil {
		return nil, err
	}
	v.at, v.info = p.val, describeView(o.Name, seen)
	p.reader = segment.NewReader(segment.ReaderOptions{
		Targets: p.segmentStore, Pool: p.uuid, IndexCacheBytes: o.IndexBytes, Log: o.Log, OnDegraded: v.noteDegraded,
	})
	err = v.patiently(ctx, v.load)
	if err != nil && ctx.Err() == nil {
		err = v.explain(ctx, err)
	}
	if err != nil {
		p.reader.Close()
		return nil, err
	}
	return v, nil
}

// readRoot reads the root from a quorum or, if that is allowed, from what there is.
func (v *View) readRoot(ctx context.Context) (root.View, error) {
	p := v.p
	var err error
	if p.reg, err = root.Open(root.Options{Targets: rootTargets(p.o.Targets), Log: v.o.Log}); err != nil {
		return root.View{}, err
	}
	seen, err := p.lookAtRoot(ctx)
	for i := 0; i < viewSettle && err == nil && seen.Quorum && !seen.Committed; i++ { // it may be on its way
		select {
		case <-time.After(viewSettleIn):
		case <-ctx.Done():
			return seen, context.Cause(ctx)
		}
		seen, err = p.lookAtRoot(ctx)
	}
	if ctx.Err() != nil {
		return seen, context.Cause(ctx)
	}
	if newer := newerRoot(seen); newer != nil {
		return seen, newer
	}
	if err == nil && seen.Quorum {
		return seen, nil
	}
	if errors.Is(err, root.ErrNotCreated) {
		return seen, fmt.Errorf("%w: %w", ErrNoPool, err)
	}
	return v.readMinority(ctx, seen)
}

// readMinority makes the best of copies that are too few. first is what was read of them.
func (v *View) readMinority(ctx context.Context, first root.View) (root.View, error) {
	p := v.p
	pools := map[string]bool{}
	for _, t := range first.Targets {
		if t.Copy != nil {
			pools[t.Copy.Pool] = true
		}
	}
	if len(pools) != 1 {
		err := fmt.Errorf("no copy of the root can be read: %w", orNoQuorum(first.Err()))
		if len(pools) > 1 {
			err = fmt.Errorf("the targets hold copies of the root of %d pools, and too few of any; leave those out of the configuration that do not belong here: %w",
				len(pools), orNoQuorum(first.Err()))
		}
		return first, err
	}
	for id := range pools {
		var err error
		if p.reg, err = root.Open(root.Options{Pool: id, Targets: rootTargets(p.o.Targets), Log: v.o.Log}); err != nil {
			return first, err
		}
	}
	seen, err := p.reg.Read(ctx)
	switch {
	case ctx.Err() != nil:
		return seen, context.Cause(ctx)
	case err != nil:
		return seen, err
	case newerRoot(seen) != nil:
		return seen, newerRoot(seen)
	case seen.Quorum, v.o.Minority:
		return seen, nil
	}
	n, of := rootCopies(seen)
	return seen, fmt.Errorf("%d of %d copies of the root can be read, and it takes %d to know the newest cut; bring targets back, or use --force-minority to take the newest of these, cut %d, after which others may have been published: %w",
		n, of, of/2+1, seen.Best.Val.Cut, seen.Err())
}

func orNoQuorum(err error) error {
	if err == nil {
		return root.ErrNoQuorum
	}
	return err
}

// rootCopies counts the members whose copy was read, and the members.
func rootCopies(seen root.View) (n, of int) {
	for _, t := range seen.Targets {
		if t.State == root.OK {
			n++
		}
	}
	return n, len(seen.Best.Val.Cfg.Members)
}

func describeView(name string, seen root.View) ViewInfo {
	b := seen.Best
	i := ViewInfo{
		Pool: name, UUID: seen.Pool, Epoch: b.Accepted.Epoch, Cut: b.Val.Cut, State: b.Val.State, OwnerName: b.Val.OwnerName,
		Quorum: seen.Quorum, Committed: seen.Committed,
	}
	i.Copies, i.Members = rootCopies(seen)
	return i
}

// load reads the disk table: the checkpoint's, and what the cuts since did to it.
func (v *View) load(ctx context.Context) error {
	v.disks, v.segments, v.cuts = map[block.DiskID]viewedDisk{}, map[block.SegmentID]segment.Info{}, nil
	var cut uint64
	var crc uint32
	if cs := v.at.Checkpoints; len(cs) > 0 {
		s, err := v.p.readManifest(ctx, cs[0])
		if err != nil {
			return err
		}
		for _, d := range s.Disks {
			v.disks[d.Disk] = viewedDisk{d.Meta, d.Runs}
		}
		for _, info := range s.Segments {
			v.segments[info.ID] = info
		}
		cut, crc = s.Cut, s.CutCRC
		v.info.Time = v.checkpointTime(ctx, cs[0])
	}
	refs, err := v.cutsAfter(cut)
	if err != nil {
		return err
	}
	return inOrder(ctx, slices.Values(refs), viewAtOnce, func(ctx context.Context, ref root.CutRef) (viewedCut, error) {
		last := refInfo(ref)
		rec, x, err := segment.ReadCut(ctx, v.p.segmentStore, last)
		if err != nil {
			return viewedCut{}, fmt.Errorf("cut %d: %w", ref.Cut, err)
		}
		v.p.reader.Remember(last, x)
		return viewedCut{rec, rec.AllSegments(last)}, nil
	}, func(ref root.CutRef, c viewedCut) error {
		if r := c.rec; r.Cut != ref.Cut || r.PrevCut != cut || r.PrevCRC != crc || r.CRC() != ref.Segment.CRC {
			return fmt.Errorf("record of cut %d after cut %d does not fit the root, which names cut %d after %d: %w", r.Cut, r.PrevCut, ref.Cut, cut, segment.ErrDamaged)
		}
		cut, crc, v.info.Time = c.rec.Cut, c.rec.CRC(), time.Unix(c.rec.Time, 0).UTC()
		v.cuts = append(v.cuts, c)
		for _, info := range c.infos {
			v.segments[info.ID] = info
		}
		for _, ch := range c.rec.Disks {
			if ch.Meta != nil {
				v.disks[ch.Disk] = viewedDisk{*ch.Meta, v.disks[ch.Disk].runs}
			}
		}
		return nil
	})
}

// cutsAfter are those that the root names, from the one after cut on: all of them up to its own.
func (v *View) cutsAfter(cut uint64) ([]root.CutRef, error) {
	refs := slices.Clone(v.at.Cuts)
	refs = slices.DeleteFunc(refs, func(r root.CutRef) bool { return r.Cut <= cut })
	for i, r := range refs {
		if r.Cut != cut+1+uint64(i) {
			return nil, fmt.Errorf("root names cut %d where cut %d should be: %w", r.Cut, cut+1+uint64(i), segment.ErrDamaged)
		}
	}
	if have := cut + uint64(len(refs)); have != v.at.Cut {
		return nil, fmt.Errorf("the root is at cut %d and names the cuts up to %d: %w", v.at.Cut, have, segment.ErrDamaged)
	}
	return refs, nil
}

// checkpointTime is when a checkpoint was stored, by the clock of a store; zero if none tells.
func (v *View) checkpointTime(ctx context.Context, ref root.CheckpointRef) time.Time {
	for i, t := range ref.Targets {
		if s, ok := v.p.store(t); ok {
			if info, err := s.Stat(ctx, partKey(ref.Epoch, ref.N, 0, i)); err == nil && !info.Modified.IsZero() {
				return info.Modified.Truncate(time.Second)
			}
		}
	}
	return time.Time{}
}

// Info says what the view shows.
func (v *View) Info() ViewInfo { return v.info }

// Disks lists the disks by name.
func (v *View) Disks() []ViewedDisk {
	ds := []ViewedDisk{}
	for _, id := range slices.Sorted(maps.Keys(v.disks)) {
		if m := v.disks[id].meta; m.Flags&segment.DiskDeleted == 0 {
			ds = append(ds, ViewedDisk{Name: m.Name, ID: uint32(id), SizeBytes: int64(m.SizeBytes)})
		}
	}
	slices.SortStableFunc(ds, func(a, b ViewedDisk) int { return cmp.Compare(a.Name, b.Name) })
	return ds
}

// DegradedShards counts the shards that failed a read so far: they are gone, damaged or do not answer, and what they
// hold was had from others.
func (v *View) DegradedShards() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.degraded)
}

func (v *View) noteDegraded(seg block.SegmentID, shard int, _ error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.degraded[shardID{seg, shard}] = true
}

// Close waits for requests that nobody waits for any more. No read may be under way or follow, and all disks must
// be closed.
func (v *View) Close() { v.p.reader.Close() }

// patiently does f again while the targets do not answer.
func (v *View) patiently(ctx context.Context, f func(context.Context) error) error {
	until, cancel := context.WithTimeout(ctx, v.o.Patience)
	defer cancel()
	for wait := backoff(0); ; wait = wait.next() {
		err := f(ctx)
		if err == nil || ctx.Err() != nil || final(err) || errors.Is(err, backend.ErrNotFound) {
			return err
		}
		v.o.Log.Warn("targets do not answer, trying again", "pool", v.o.Name, "err", err)
		if wait.sleep(until) != nil {
			return err
		}
	}
}

// explain makes of an error that the root named something which is gone or damaged what it means.
func (v *View) explain(ctx context.Context, err error) error {
	if !lost(err) {
		return err
	}
	return judge(err, v.fate(ctx))
}

// lost tells errors by which something that was stored is not there any more, or not intact.
func lost(err error) bool {
	return errors.Is(err, backend.ErrNotFound) || errors.Is(err, segment.ErrDamaged)
}

// judge says what it means that something is lost, given the fate of the view.
func judge(err, fate error) error {
	switch {
	case errors.Is(fate, ErrViewExpired):
		return fmt.Errorf("%w: %w", fate, err)
	case fate != nil && !errors.Is(err, segment.ErrDamaged):
		return fmt.Errorf("%w; and the root cannot be read again to tell why: %w", err, fate)
	}
	return fmt.Errorf("%w: %w", vdisk.ErrDamaged, err)
}

// fate reads the root again: nil if it still is what the view stands on, ErrViewExpired if it has gone on, so that
// objects may rightly be gone.
func (v *View) fate(ctx context.Context) error {
	now, err := v.p.lookAtRoot(ctx)
	if err == nil && v.superseded(now.Best.Val) {
		return fmt.Errorf("%w: it is at cut %d now, this is cut %d; start again", ErrViewExpired, now.Best.Val.Cut, v.at.Cut)
	}
	return err
}

// superseded tells whether objects that v.at needs may have been deleted rightly by an owner that committed now.
func (v *View) superseded(now root.Value) bool {
	same := func(a, b root.CheckpointRef) bool { return a.Epoch == b.Epoch && a.N == b.N }
	return now.Cut != v.at.Cut || !slices.EqualFunc(now.Checkpoints, v.at.Checkpoints, same)
}

// readOnlyStore keeps a View from writing, whatever it is that would.
type readOnlyStore struct{ s backend.Store }

var _ backend.Store = readOnlyStore{}

func (r readOnlyStore) refuse(op, key string) error {
	return &backend.Error{Op: op, Store: r.s.String(), Key: key, Class: backend.Permanent, Err: errors.New("it is only read here")}
}

// Put implements backend.Store.
func (r readOnlyStore) Put(_ context.Context, key string, _ []byte, _ backend.Cond) (string, error) {
	return "", r.refuse("put", key)
}

// Delete implements backend.Store.
func (r readOnlyStore) Delete(_ context.Context, key string) error { return r.refuse("delete", key) }

// Get implements backend.Store.
func (r readOnlyStore) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	return r.s.Get(ctx, key, max)
}

// ReadAt implements backend.Store.
func (r readOnlyStore) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	return r.s.ReadAt(ctx, key, p, off)
}

// Stat implements backend.Store.
func (r readOnlyStore) Stat(ctx context.Context, key string) (backend.Info, error) {
	return r.s.Stat(ctx, key)
}

// List implements backend.Store.
func (r readOnlyStore) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	return r.s.List(ctx, prefix, after, max)
}

// String implements backend.Store.
func (r readOnlyStore) String() string { return r.s.String() }

// inOrder calls get for each job, up to atOnce side by side, and use with what came of it, one after the other in the
// order of jobs. Jobs are taken only as others are used, so that no more than atOnce results are in memory. The first
// error of either ends everything and is returned, once no call is under way.
func inOrder[J, R any](ctx context.Context, jobs iter.Seq[J], atOnce int, get func(context.Context, J) (R, error), use func(J, R) error) error {
	ctx, cancel := context.WithCancel(ctx)
	type result struct {
		job J
		r   R
		err error
	}
	queue := make(chan chan result, atOnce)
	slots := make(chan struct{}, atOnce) // taken by a job until it is used
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		defer close(queue)
		for j := range jobs {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			done := make(chan result, 1)
			queue <- done // has room: there are no more than slots
			wg.Go(func() {
				r, err := get(ctx, j)
				done <- result{j, r, err}
			})
		}
	})
	for done := range queue {
		d := <-done
		if d.err != nil {
			return d.err
		}
		if err := use(d.job, d.r); err != nil {
			return err
		}
		<-slots
	}
	return context.Cause(ctx)
}
