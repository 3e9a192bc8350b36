// Package pool opens and joins what is below it: the tier with the log and the cache, the targets
// with the segments, the maps of the disks, and the root register that says who owns them.
//
//	guest write ─► vdisk ─► log ──freeze──► frozen index ──pack──► segments ──► targets
//	                         │                                                    │
//	                         │◄─ publication record ◄── root committed ◄──────────┘
//	                         ▼
//	              tree entries, cache entries; the generation is dropped
//
// The publisher owns everything that changes in the cloud. It claims the pool; then one goroutine packs
// cuts, fills banks and has them stored, and another commits the cuts in order and writes the checkpoints:
//
//	packer     freeze 7 | banks of 7 ........ | freeze 8 | banks of 8 ........
//	committer                  6 committed    | last of 7, root, record, maps | 8 ...
//
// The order within one cut is fixed:
//
//  1. the log index is frozen at S and the log made stable through S;
//  2. the stripes are stored, the one that holds the cut's record last;
//  3. the root is committed with the cut: from here on it is published;
//  4. the publication record is made stable in the metadata log;
//  5. the maps change: tree, then cache, and only then is the log's generation dropped.
//
// Who owns the pool the root says; the rest is for people, and for not answering what is no longer ours to answer:
//
//	beat.go    an owner rewrites a small object while it commits nothing
//	watch.go   who wants a pool that is held looks whether its owner lives, and what it would cost to take over
//	pulse.go   an owner that may have stood still asks the root before it answers anything more
//	fence.go   one that was taken over from answers nothing more, and lists (lost.go) what nobody published
//
// A crash before 3 leaves orphan objects and an unpublished log. Between 3 and 4 the root is one cut
// ahead of the tier, which the next open sees and mends by reading the cut from the targets.
package pool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"graindisk/backend"
	"graindisk/block"
	"graindisk/grains/cache"
	"graindisk/grains/extent"
	"graindisk/grains/fetch"
	"graindisk/grains/segment"
	"graindisk/internal/turn"
	"graindisk/internal/vfs"
	"graindisk/pool/root"
	"graindisk/tier"
	"graindisk/vdisk"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// What callers branch on.
var (
	// ErrNoDisk means the pool has no disk of that name.
	ErrNoDisk = errors.New("no such disk")
	// ErrExists means the name is taken.
	ErrExists = errors.New("disk exists")
	// ErrNoPool means the targets hold no pool.
	ErrNoPool = errors.New("no pool on the targets")
	// ErrForeignTier means that the log on the tier does not belong to the pool's owner.
	ErrForeignTier = errors.New("the tier holds another owner's log")
	// ErrNotEmpty means that a pool cannot be created because something is there already.
	ErrNotEmpty = errors.New("not empty")
	// ErrShutdown means that the stores did not answer in time at Close: the log is intact and the
	// pool stays held.
	ErrShutdown = errors.New("the targets did not answer in time")
)

// Target is one place that holds shards, under the name that people know it by.
type Target struct {
	Name  string
	Store backend.Store
	// Witness is what the target becomes when a pool is created on it, or when it is taken into one: it then holds a
	// copy of the root and no shards. A member stays what it became.
	Witness bool
}

// Options configure a pool. A zero field has the default that its comment names.
type Options struct {
	Name    string // for messages
	Targets []Target
	FS      vfs.FS // default vfs.OS
	TierDir string // made if it is missing
	// TierBytes bounds the log and the cache together; default 10 GiB, at least 8 slots.
	TierBytes int64
	// SlotBytes is the unit of tier space; default the larger of 64 MiB and TierBytes/1024, at most 4 GiB.
	SlotBytes int64
	// Data and Parity are the stripe profile of a pool that is being created; default 2+1.
	Data, Parity int
	// SegmentBytes is the payload of a full segment of a pool being created; default 32 MiB.
	SegmentBytes int64
	// Compression packs what new segments hold, where that pays; segments say themselves how they are packed.
	Compression segment.Codec
	// MaxDirtyAge is the age at which unpublished writes start a cut; default 30 s.
	MaxDirtyAge time.Duration
	// MaxExposure bytes unpublished, or some of them MaxExposureAge old, make new writes wait; default 0,
	// no bound.
	MaxExposure    int64
	MaxExposureAge time.Duration
	// CutBytes of unpublished writes start a cut; default 32 segments, at most a third of the tier.
	CutBytes int64
	// CheckpointCuts is how many cuts the root names before a checkpoint is published; default 128, at
	// most root.CutsMax-1.
	CheckpointCuts int
	// CheckpointBytes of metadata log make the next cut write a local checkpoint; default 16 MiB.
	CheckpointBytes int64
	// IndexBytes bounds the cached segment indexes in RAM; default 64 MiB.
	IndexBytes int64
	// RAMBytes bounds the cache of blocks in RAM, everything counted; default none, else at least 256 KiB.
	RAMBytes int64
	// CacheIndexBytes bounds the index of what is cached on the tier, in RAM; where that is too little, less is
	// cached. The index of unpublished writes counts against up to half of it. Default 7 MiB per GiB of tier,
	// which is enough for any extents; see SplitRAM.
	CacheIndexBytes int64
	// BootBytes bounds what is recorded of each disk's first reads after an open, and read ahead at the next;
	// default 256 MiB, negative for nothing.
	BootBytes int64
	// MapBytes bounds the cached pages of the disks' maps in RAM; default 16 MiB.
	MapBytes int64
	// Beat is the most time between two signs of life of an owner: a commit, or else a beat. 0 for no beats.
	Beat time.Duration
	// Watch is how long the owner of a pool that is held elsewhere must give no sign of life before the pool may be taken
	// over; no less than twice its Beat. An owner that stood still for half of it asks the root before it answers
	// anything more. 0: neither.
	Watch time.Duration
	// Gone tells whether the process that held the pool under that epoch and log is known to have ended; then it is
	// not watched. May be nil.
	Gone     func(epoch uint64, log string) bool
	Host     string // who we are in messages; default the host's name
	Takeover bool   // take a pool that another owner holds; see Open
	// CreateEmpty lets Open create the pool if the tier is empty and no target holds anything.
	CreateEmpty bool
	// DeleteGrace is how long an object stays stored once no checkpoint that the root names reaches it: readers that
	// look at an older root find it that long; default 24 h.
	DeleteGrace time.Duration
	// UndeleteWindow is how long a deleted disk can be had back; default 24 h.
	UndeleteWindow time.Duration
	// Probe, if set, is asked whether a target that is empty can hold a pool, before one is created there.
	Probe func(context.Context, Target) error
	// RootTimeout is how long Open waits for the root before it serves from an intact log; default 5 s.
	RootTimeout time.Duration
	// RootLook is how long it waits instead if the owner of the tier's log is known to have been alive a moment
	// ago, so that the pool cannot have gone to another meanwhile; default RootTimeout. Where the log alone
	// is not enough Open waits for RootTimeout all the same.
	RootLook time.Duration
	// ScrubPeriod is the time in which everything on the targets is read and checked once, in the background;
	// 0 = never by itself. ScrubRate bounds that, and the repair of what reads find damaged; bytes per
	// second, default 32 MiB.
	ScrubPeriod time.Duration
	ScrubRate   int64
	// RepairReads has shards that a read finds damaged or missing examined and repaired in the background.
	RepairReads bool
	Log         *slog.Logger

	// RepairRate bounds the repair in the background, in bytes of restored shards per second; default 32 MiB,
	// negative for none: see Repair.
	RepairRate int64

	// Tests make these small: entries of a map's level 0 and of a run, rows of a checkpoint's manifest.
	mapLevel0, mapRun, tableRows int
	mapWhole, mapRate            int64         // see farWhole and farRate; a negative rate fetches nothing in the background
	publicationBytes             int           // of one record of a publication; default 8 MiB
	reclaimTick, reclaimRound    time.Duration // see reclaim; default a minute, and an eighth of DeleteGrace
	repairPoll                   time.Duration
	lostAfter                    time.Duration // see placement; default lostAfter
}

func (o Options) withDefaults() Options {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	if o.FS == nil {
		o.FS = vfs.OS{}
	}
	def(&o.TierBytes, 10<<30)
	def(&o.SlotBytes, min(4<<30, max(64<<20, (o.TierBytes/1024+block.Size-1)/block.Size*block.Size)))
	if o.Data == 0 {
		o.Data, o.Parity = 2, 1
	}
	def(&o.SegmentBytes, 32<<20)
	def(&o.CutBytes, min(32*o.SegmentBytes, o.TierBytes/cutShare))
	if o.MaxExposure > 0 {
		o.CutBytes = min(o.CutBytes, max(block.Size, o.MaxExposure/2)) // publish before writes have to wait
	}
	def(&o.IndexBytes, 64<<20)
	def(&o.CacheIndexBytes, cacheIndexMost(o.TierBytes))
	def(&o.BootBytes, 256<<20)
	def(&o.MapBytes, 16<<20)
	def(&o.CheckpointBytes, 16<<20)
	def(&o.ScrubRate, scrubRateUsed)
	def(&o.mapWhole, farWhole)
	def(&o.mapRate, farRate)
	if o.tableRows == 0 {
		o.tableRows = tableRowsMax
	}
	if o.publicationBytes == 0 {
		o.publicationBytes = publicationBytesFull
	}
	def(&o.RepairRate, 32<<20)
	if o.repairPoll == 0 {
		o.repairPoll = repairPoll
	}
	if o.lostAfter == 0 {
		o.lostAfter = lostAfter
	}
	if o.CheckpointCuts == 0 {
		o.CheckpointCuts = 128
	}
	if o.MaxDirtyAge == 0 {
		o.MaxDirtyAge = 30 * time.Second
	}
	if o.DeleteGrace == 0 {
		o.DeleteGrace = 24 * time.Hour
	}
	if o.UndeleteWindow == 0 {
		o.UndeleteWindow = 24 * time.Hour
	}
	if o.reclaimTick == 0 {
		o.reclaimTick = min(time.Minute, max(o.DeleteGrace/16, time.Second))
	}
	if o.reclaimRound == 0 {
		o.reclaimRound = max(o.DeleteGrace/8, time.Minute)
	}
	if o.RootTimeout == 0 {
		o.RootTimeout = 5 * time.Second
	}
	if o.RootLook == 0 || o.RootLook > o.RootTimeout {
		o.RootLook = o.RootTimeout
	}
	if o.Host == "" {
		o.Host, _ = os.Hostname()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// What the cache's index takes per GiB of tier, at extents of 4 KiB and of a whole grain, and the least bound
// that is worth setting: segments have indexes of their own.
const (
	cacheIndexSmall = 7 << 20
	cacheIndexGrain = 3 << 19
	cacheIndexLeast = 1 << 20
)

func cacheIndexMost(tierBytes int64) int64 {
	return max(cacheIndexLeast, tierBytes>>10*cacheIndexSmall>>20)
}

// SplitRAM divides ram bytes of memory between the index of what is cached on a tier of tierBytes, which
// gets what it can need but at most half, the indexes of segments and the cache of blocks in RAM.
func SplitRAM(ram, tierBytes int64) (cacheIndex, segmentIndexes, blocks int64) {
	cacheIndex = min(cacheIndexMost(tierBytes), ram/2)
	rest := ram - cacheIndex
	return cacheIndex, rest / 4, rest - rest/4
}

// warnOfRAM says so if the index of what is cached has no room for the whole tier, even in whole grains.
func (o Options) warnOfRAM() {
	need := o.TierBytes >> 10 * cacheIndexGrain >> 20
	if o.CacheIndexBytes >= need {
		return
	}
	o.Log.Warn("tier.ram is small for tier.size: the index of the whole tier does not fit, so that part of it caches nothing",
		"pool", o.Name, "tier_bytes", o.TierBytes, "index_bytes_max", o.CacheIndexBytes, "index_bytes_wanted", need,
		"cacheable_bytes", int64(float64(o.TierBytes)*float64(o.CacheIndexBytes)/float64(need)))
}

func (o Options) validate() error {
	var errs []error
	if len(o.Targets) == 0 {
		errs = append(errs, errors.New("no targets"))
	} else if !slices.ContainsFunc(o.Targets, func(t Target) bool { return !t.Witness }) {
		errs = append(errs, errors.New("all targets are witnesses, which hold no data"))
	}
	if o.TierBytes/o.SlotBytes < slotsMin || o.SlotBytes < slotBytesMin {
		errs = append(errs, fmt.Errorf("tier of %d bytes holds %d slots of %d bytes; at least %d of %d are needed",
			o.TierBytes, o.TierBytes/o.SlotBytes, o.SlotBytes, slotsMin, slotBytesMin))
	}
	if o.Data < 1 || o.Data > 16 || o.Parity < 0 || o.Parity > 4 {
		errs = append(errs, fmt.Errorf("stripe %d+%d: data must be 1 to 16 and parity 0 to 4", o.Data, o.Parity))
	}
	if o.DeleteGrace < 0 || o.UndeleteWindow < 0 {
		errs = append(errs, fmt.Errorf("grace of %v and window of %v: must not be negative", o.DeleteGrace, o.UndeleteWindow))
	}
	if o.Beat < 0 || o.Watch < 0 {
		errs = append(errs, fmt.Errorf("beats every %v, watched for %v: must not be negative", o.Beat, o.Watch))
	}
	if o.MaxExposure < 0 || o.MaxExposureAge < 0 || o.MaxExposureAge > 0 && o.MaxExposureAge <= o.MaxDirtyAge {
		errs = append(errs, fmt.Errorf("exposure of at most %d bytes and %v: must not be negative, and the age above %v, the age of a cut", o.MaxExposure, o.MaxExposureAge, o.MaxDirtyAge))
	}
	if o.CheckpointCuts < 1 || o.CheckpointCuts >= root.CutsMax {
		errs = append(errs, fmt.Errorf("a checkpoint every %d cuts: must be 1 to %d", o.CheckpointCuts, root.CutsMax-1))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("pool %s: %w", o.Name, err)
	}
	return nil
}

// Pool is an open pool. All methods are safe for concurrent use.
type Pool struct {
	o       Options
	space   *tier.Space
	runs    *densetree.Store // of the maps
	log     *writeback.Log
	cache   *cache.Cache
	reader  *segment.Reader
	fetcher *fetch.Fetcher // of extents that the tier has not got
	ahead   sync.WaitGroup // readahead being resolved
	aheads  atomic.Int32   // and how many are
	reg     *root.Register
	runID   atomic.Uint64        // numbers runs of the dense trees
	gateFn  atomic.Pointer[gate] // the answer to every request, once the pool must not serve any more
	pulse   pulse                // whether replies may leave
	broken  atomic.Pointer[gate] // why no more cuts are made

	// usage counts what the maps have of each segment; see usage.go.
	usage    *extent.Usage // replaced only while opening
	usageErr atomic.Pointer[gate]

	committed   atomic.Pointer[time.Time] // when the root was committed last
	claimedAt   atomic.Pointer[time.Time]
	lastBeat    atomic.Pointer[Beat]
	fence       atomic.Pointer[Fence]
	quarantines []Quarantine // as of the open

	uuid       uuid.UUID
	logID      writeback.UUID
	slotBytes  int64 // of the tier, noted in the log it holds; 0 if not
	epoch      atomic.Uint64
	firstEpoch atomic.Uint64 // that this process claimed; what it packs is of this one or a later one
	ops        chan struct{} // holds a token while an operation on a disk is under way: one at a time
	segMu      turn.Lock     // one segment number is drawn at a time

	buffers    *segment.Buffers
	foreground foreground

	// The targets by member number; they change only before serving starts and at the first claim.
	storesMu sync.RWMutex
	stores   map[block.TargetID]backend.Store
	names    map[block.TargetID]string
	roots    map[block.TargetID]root.State // of its copy of the root, when it was last looked at
	rootErrs map[block.TargetID]error      // what more there is to say of that; nil if nothing

	// mapsMu is held from a record of a change of the maps in the metadata log until the maps have
	// changed, and over the making of a local checkpoint: that holds what the records before it say.
	// It is taken before mu and never held while a target is waited for.
	mapsMu turn.Lock
	closed bool // guarded by mapsMu: the maps are no more
	// localMu is held over the writing of a local checkpoint, until it is known which files of the maps it
	// needs. It is taken before mapsMu.
	localMu turn.Lock
	// maps is held for reading while a map changes and what it lost is counted: see mapsNow.
	maps sync.RWMutex
	// replaying is set while the metadata log is read: maps then take what comes and merge later.
	replaying  atomic.Bool
	storedRuns atomic.Pointer[map[uint64]runRef] // the publisher's ckpt.runs, for readers

	mu            sync.Mutex
	disks         map[string]*vdisk.Disk            // live, by name; made by nameDisks
	rows          map[block.DiskID]segment.DiskMeta // the disk table as of the end of the log, deleted disks too
	serving       bool                              // it is ours to change; until then recovery fills it
	failedUploads []segment.Info                    // not told to the reclaimer yet
	reclaimed     reclaimCounts
	trees         map[block.DiskID]*densetree.Tree
	segments      map[block.SegmentID]segment.Info
	nextDisk      block.DiskID
	val           root.Value // as last committed or read; the publisher changes it
	claimed       bool
	sick          map[block.TargetID]sickness // targets that failed lately

	boots  boots
	scrubs scrubs
	repair repairer
	far    farMaps

	pub publisher // owned by the publisher goroutine
}

// gate is an error that was met for good.
type gate struct{ err error }

func (p *Pool) gate() error {
	if g := p.gateFn.Load(); g != nil {
		return g.err
	}
	return nil
}

// Create makes a new pool on the targets. It refuses if any target holds a root already, and, with
// requireEmpty, if any target holds any object at all.
func Create(ctx context.Context, o Options) error {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return err
	}
	for _, t := range o.Targets {
		objs, _, err := t.Store.List(ctx, "", "", 1)
		if err != nil {
			err = fmt.Errorf("create pool %s: target %s: %w", o.Name, t.Name, err)
			if backend.ClassOf(err) == backend.Transient {
				err = fmt.Errorf("%w; check the endpoint", err)
			}
			return err
		}
		if len(objs) > 0 {
			key := objs[0].Key
			if _, err := t.Store.Stat(ctx, root.Key); err == nil { // there is a pool: say so, rather than what sorts first
				key = root.Key
			}
			return fmt.Errorf("create pool %s: target %s (%s) holds %q: %w; give the pool an empty place or its own prefix", o.Name, t.Name, t.Store, key, ErrNotEmpty)
		}
	}
	if err := o.probeAll(ctx); err != nil {
		return fmt.Errorf("create pool %s: %w", o.Name, err)
	}
	v := root.Value{
		Format: root.ValueFormat, Cfg: root.Config{No: 1}, State: root.Released, SegLimit: 1,
		Stripe: root.Stripe{Data: o.Data, Parity: o.Parity}, GrainBytes: GrainBytes, SegmentBytes: o.SegmentBytes,
	}
	for i, t := range o.Targets {
		v.Cfg.Members = append(v.Cfg.Members, root.Member{ID: block.TargetID(i + 1), UUID: uuid.NewString(), Name: t.Name, Witness: t.Witness})
	}
	if err := root.Create(ctx, rootTargets(o.Targets), uuid.NewString(), v); err != nil {
		return fmt.Errorf("create pool %s: %w", o.Name, err)
	}
	o.Log.Info("pool created", "pool", o.Name, "targets", len(o.Targets), "data", o.Data, "parity", o.Parity)
	return nil
}

// probeAll asks Probe of all targets at once.
func (o Options) probeAll(ctx context.Context) error {
	if o.Probe == nil {
		return nil
	}
	errs := make([]error, len(o.Targets))
	var wg sync.WaitGroup
	for i, t := range o.Targets {
		wg.Go(func() {
			if err := o.Probe(ctx, t); err != nil {
				errs[i] = fmt.Errorf("target %s: %w", t.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func rootTargets(ts []Target) []root.Target {
	rs := make([]root.Target, len(ts))
	for i, t := range ts {
		rs[i] = root.Target{Name: t.Name, Store: t.Store}
	}
	return rs
}

// The least a tier must be: the log's current file, two at hand and two in reserve, and some cache.
const (
	slotsMin     = 8
	slotBytesMin = 16 * block.Size
)

// GrainBytes is the unit of caching and of map lookup, fixed at creation.
const GrainBytes = 64 << 10

const grainBlocks = GrainBytes / block.Size
