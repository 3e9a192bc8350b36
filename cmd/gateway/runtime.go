package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"graindisk/api"
	"graindisk/backend"
	"graindisk/backend/adaptive"
	"graindisk/backend/azure"
	"graindisk/backend/local"
	"graindisk/backend/s3"
	"graindisk/config"
	"graindisk/frontend/nbd"
	"graindisk/grains/segment"
	"graindisk/internal/access"
	"graindisk/internal/jobs"
	"graindisk/internal/vfs"
	"graindisk/pool"
	"graindisk/vdisk"
	"graindisk/writeback"
)

// gateway is the open pools of one process. It answers the admin API and finds the exports of the
// NBD frontend.
type gateway struct {
	pools        atomic.Pointer[map[string]*pool.Pool]                             // replaced when one is released; see all
	grants       atomic.Pointer[map[string]access.Grants]                          // by disk
	drop         func(ctx context.Context, leaving func(export string) bool) error // of the NBD server; set before clients come
	closeTimeout time.Duration                                                     // of one pool that is released
	onDrop       sync.Mutex                                                        // one pool is released at a time
	work         *jobs.Runner

	naming     sync.Mutex      // held while a name that no disk has is given to one
	configured map[string]bool // names of disks in the configuration
}

// sorted are the pools by name.
func (g *gateway) sorted() []*pool.Pool {
	ps := make([]*pool.Pool, 0, len(g.all()))
	for _, name := range slices.Sorted(maps.Keys(g.all())) {
		ps = append(ps, g.all()[name])
	}
	return ps
}

// all are the pools that are served now, by name; not to be changed. One that is released at the moment may be among
// them: what it is asked after it was closed fails.
func (g *gateway) all() map[string]*pool.Pool { return *g.pools.Load() }

// poolsAtOnce are opened side by side: each may wait for its targets.
const poolsAtOnce = 8

// openGateway opens every pool of the configuration and makes the disks that it lists and that are
// missing. On failure whatever it opened is closed, with the log intact and the pool held.
func openGateway(ctx context.Context, cfg *config.Config, takeover bool, data *dataDir, log *slog.Logger) (*gateway, error) {
	g, pools := &gateway{closeTimeout: cfg.ShutdownTimeout, configured: map[string]bool{}, work: jobs.New()}, map[string]*pool.Pool{}
	g.pools.Store(&pools)
	for _, pc := range cfg.Pools {
		for _, d := range pc.Disks {
			g.configured[d.Name] = true
		}
	}
	if err := g.setAccess(cfg); err != nil {
		return nil, err
	}
	var mu sync.Mutex // of pools
	eg, octx := errgroup.WithContext(ctx)
	eg.SetLimit(poolsAtOnce)
	for _, name := range slices.Sorted(maps.Keys(cfg.Pools)) {
		eg.Go(func() error {
			p, err := openPool(octx, cfg, name, takeover, data, log)
			if p != nil {
				mu.Lock()
				pools[name] = p
				mu.Unlock()
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		g.abandon()
		return nil, err
	}
	return g, nil
}

// openPool opens a pool and makes its disks. If only that fails, it returns the pool too.
func openPool(ctx context.Context, cfg *config.Config, name string, takeover bool, data *dataDir, log *slog.Logger) (*pool.Pool, error) {
	o, err := poolOptions(ctx, cfg, name, log)
	if err != nil {
		return nil, err
	}
	o.Takeover, o.CreateEmpty, o.Gone = takeover, cfg.Embedded, data.hadTenure
	// Who was away for less than half the watch time went on running, as far as anybody can tell.
	short := o.Watch == 0 || aliveWithin <= o.Watch/2
	if id, err := writeback.ReadIdentity(vfs.OS{}, o.TierDir); err == nil && short && data.servedJustNow(id.Log) {
		o.RootLook = rootLook
	}
	if err := checkTierSpace(o.TierDir, config.Bytes(o.TierBytes)); err != nil {
		return nil, fmt.Errorf("pool %s: %w", name, err)
	}
	p, err := pool.Open(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, d := range cfg.Pools[name].Disks {
		have, err := p.Disk(d.Name)
		if errors.Is(err, pool.ErrNoDisk) && p.WasDeleted(d.Name) {
			log.Warn("disk is in the configuration but was deleted or renamed, so it is not made again; take it out, or see \"gateway disk undelete\" and \"disk create\"", "disk", d.Name)
			continue
		}
		if errors.Is(err, pool.ErrNoDisk) {
			have, err = p.CreateDisk(ctx, d.Name, int64(d.Size))
		}
		if err != nil {
			return p, err
		}
		if have.Size() != int64(d.Size) {
			log.Warn("disk keeps its size; the configuration says another", "disk", d.Name,
				"size", config.Bytes(have.Size()).String(), "configured", d.Size.String())
		}
	}
	return p, nil
}

// checkTierSpace refuses to begin a tier that its file system has no room for. One that holds a log
// is opened however full the file system is: what is in it must get out.
func checkTierSpace(dir string, size config.Bytes) error {
	if _, err := writeback.ReadIdentity(vfs.OS{}, dir); !errors.Is(err, writeback.ErrNoLog) {
		return nil // opening it tells more
	}
	at, free, err := config.FreeSpace(dir)
	if err != nil {
		return fmt.Errorf("tier %s: %w", dir, err)
	}
	if free < size {
		return fmt.Errorf("tier %s: the file system at %s has %v free and tier.size is %v; free some space, or configure a smaller tier.size or another tier.dir", dir, at, free, size)
	}
	return nil
}

// poolOptions are a pool's options by the configuration. They open its targets but no pool.
func poolOptions(ctx context.Context, cfg *config.Config, name string, log *slog.Logger) (pool.Options, error) {
	pc := cfg.Pools[name]
	tierBytes := int64(cfg.Tier.Size) / int64(len(cfg.Pools))
	cacheIndex, segmentIndexes, blocks := pool.SplitRAM(int64(cfg.Tier.RAM)/int64(len(cfg.Pools)), tierBytes)
	o := pool.Options{
		Name: name, TierDir: filepath.Join(cfg.Tier.Dir, name),
		TierBytes: tierBytes, CacheIndexBytes: cacheIndex, IndexBytes: segmentIndexes, RAMBytes: blocks,
		Data: pc.Stripe.Data, Parity: pc.Stripe.Parity, MaxDirtyAge: pc.MaxDirtyAge,
		MaxExposure: int64(pc.MaxExposure), MaxExposureAge: pc.MaxExposureAge, Beat: pc.Beat, Watch: pc.Watch, Log: log,
		DeleteGrace: pc.DeleteGrace, UndeleteWindow: pc.UndeleteWindow,
		RepairRate:  int64(pc.RepairRate),
		ScrubPeriod: pc.ScrubPeriod, ScrubRate: int64(pc.ScrubRate), RepairReads: true,
	}
	var err error
	if o.Compression, err = segment.ParseCodec(string(pc.Compression)); err != nil {
		return o, fmt.Errorf("pool %s: %w", name, err)
	}
	// The embedded default makes its directories, until there is a tier that knows them.
	_, err = writeback.ReadIdentity(vfs.OS{}, o.TierDir)
	makeDirs := cfg.Embedded && errors.Is(err, writeback.ErrNoLog)
	for _, t := range pc.Targets {
		s, err := openStore(ctx, t, makeDirs, 1, log)
		if err != nil {
			return o, fmt.Errorf("pool %s: target %s: %w", name, t.Name, err)
		}
		o.Targets = append(o.Targets, pool.Target{Name: t.Name, Store: adapt(s, t, log), Witness: t.Witness})
	}
	return o, nil
}

// adapt keeps a target's store within its limits and watches it.
func adapt(s backend.Store, t config.Target, log *slog.Logger) *adaptive.Store {
	o := adaptive.Options{
		Limits: adaptive.Limits{
			Concurrency: t.Limits.Concurrency, RequestsPerSecond: t.Limits.RequestsPerSecond,
			UploadPerSecond: int64(t.Limits.Upload), DownloadPerSecond: int64(t.Limits.Download),
		},
		Prices: adaptive.Prices(t.Prices), Log: log.With("target", t.Name),
	}
	for _, w := range t.Limits.Schedule {
		from, to := w.Bounds()
		o.Schedule = append(o.Schedule, adaptive.Window{From: from, To: to, Limits: adaptive.Limits{
			Concurrency: w.Concurrency, RequestsPerSecond: w.RequestsPerSecond,
			UploadPerSecond: int64(w.Upload), DownloadPerSecond: int64(w.Download),
		}})
	}
	return adaptive.New(s, o)
}

// openStore opens one target, whose driver makes so many attempts of a call by itself; 0 is the driver's default. A
// directory that cannot be opened now is a target that is away: the pool decides whether it can do without, and it
// may come back.
func openStore(ctx context.Context, t config.Target, makeDir bool, attempts int, log *slog.Logger) (backend.Store, error) {
	if t.Local != nil {
		if makeDir {
			return local.Open(t.Local.Dir, local.Options{Create: true})
		}
		s, err := local.OpenLate(t.Local.Dir)
		if err != nil {
			log.Warn("target is away; mount it, or create the directory if it is lost for good", "target", t.Name, "dir", t.Local.Dir, "err", err)
		}
		return s, nil
	}
	if a := t.Azure; a != nil {
		o := azure.Options{Account: a.Account, Container: a.Container, Prefix: a.Prefix, Endpoint: a.Endpoint, CAFile: a.CAFile, Attempts: attempts}
		read := func(context.Context) (azure.Credentials, error) {
			c, err := a.Credentials()
			return azure.Credentials{AccountKey: string(c.AccountKey), SAS: string(c.SAS), ConnectionString: string(c.ConnectionString)}, err
		}
		var err error
		if o.Credentials, err = read(ctx); err != nil {
			return nil, err
		}
		if a.CredentialsFile != "" {
			o.Renew = read
		}
		return azure.Open(o)
	}
	o, err := s3Options(t.S3)
	if err != nil {
		return nil, err
	}
	o.Attempts = attempts
	return s3.Open(ctx, o)
}

// s3Options are those of the driver. A credentials file must be good now; it is read again while the store is
// in use.
func s3Options(c *config.S3) (s3.Options, error) {
	cred, err := c.Credentials()
	if err != nil {
		return s3.Options{}, err
	}
	o := s3.Options{
		Bucket: c.Bucket, Prefix: c.Prefix, Region: c.Region, Endpoint: c.Endpoint, PathStyle: c.PathStyle, CAFile: c.CAFile,
		MultipartAbove: int64(c.MultipartAbove), StorageClass: c.StorageClass, SSE: c.SSE, KMSKey: c.KMSKeyID, Checksum: s3.Checksum(c.Checksum),
		RoleARN: c.RoleARN, ExternalID: c.ExternalID, SessionName: c.RoleSessionName, STSEndpoint: c.STSEndpoint,
	}
	switch {
	case c.ConfigFile != "":
		o.ConfigFile, o.CredentialsFile, o.Profile = c.ConfigFile, c.CredentialsFile, cmp.Or(c.Profile, "default")
	case c.CredentialsFile != "":
		o.Keys = func(context.Context) (s3.Keys, error) {
			cred, err := c.Credentials()
			return s3.Keys{AccessKey: string(cred.AccessKeyID), SecretKey: string(cred.SecretAccessKey), SessionToken: string(cred.SessionToken)}, err
		}
	case c.Profile != "":
		o.Profile = c.Profile
	default:
		o.AccessKey, o.SecretKey, o.SessionToken = string(cred.AccessKeyID), string(cred.SecretAccessKey), string(cred.SessionToken)
	}
	return o, nil
}

// close publishes and releases every pool. One that is being released by request is waited for.
func (g *gateway) close(ctx context.Context) error {
	g.work.Close()
	g.onDrop.Lock()
	pools := g.all()
	g.pools.Store(new(map[string]*pool.Pool)) // for requests that come too late
	g.onDrop.Unlock()
	var eg errgroup.Group
	for _, p := range pools {
		eg.Go(func() error { return p.Close(ctx) })
	}
	return eg.Wait()
}

// abandon closes every pool as it is: nothing more is published, and each stays held. Whoever opens
// it next on the same tier goes on from the log. It fails only if a log could not be closed.
func (g *gateway) abandon() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := g.close(ctx); !errors.Is(err, pool.ErrShutdown) {
		return err
	}
	return nil
}

// tenures are those of the pools that serve, with nothing that keeps them from going on.
func (g *gateway) tenures() (ts []tenure) {
	for _, p := range g.all() {
		if id, ok := p.Owner(); ok {
			ts = append(ts, tenure{id, p.Claimed()})
		}
	}
	return ts
}

// find returns the disk of that name, in whichever pool it is.
func (g *gateway) find(name string) (*pool.Pool, *vdisk.Disk, error) {
	for _, p := range g.all() {
		if d, err := p.Disk(name); err == nil {
			return p, d, nil
		}
	}
	return nil, nil, fmt.Errorf("disk %s: %w; see \"gateway disk list\"", name, pool.ErrNoDisk)
}

// List implements nbd.Exports.
func (g *gateway) List() []string {
	var names []string
	for _, d := range g.Disks() {
		names = append(names, d.Name)
	}
	return names
}

// Open implements nbd.Exports.
func (g *gateway) Open(_ context.Context, name string) (nbd.Device, func(), error) {
	_, d, err := g.find(name)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", nbd.ErrNotFound, err)
	}
	release, err := d.Use()
	if errors.Is(err, vdisk.ErrDeleted) { // a moment ago
		return nil, nil, fmt.Errorf("%w: %w", nbd.ErrNotFound, err)
	}
	return d, release, err
}

// Version implements api.Gateway.
func (g *gateway) Version() string { return buildVersion().Version }

// Disks implements api.Gateway.
func (g *gateway) Disks() []pool.DiskInfo {
	ds := []pool.DiskInfo{}
	pools := g.all()
	for _, name := range slices.Sorted(maps.Keys(pools)) {
		ds = append(ds, pools[name].Disks()...)
	}
	return ds
}

// Disk implements api.Gateway.
func (g *gateway) Disk(name string) (pool.DiskInfo, error) {
	p, d, err := g.find(name)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	return p.Describe(d), nil
}

// CreateDisk implements api.Gateway.
func (g *gateway) CreateDisk(ctx context.Context, n api.NewDisk) (pool.DiskInfo, error) {
	err := errors.Join(config.CheckDiskName(n.Name), config.CheckDiskSize(config.Bytes(n.SizeBytes)))
	if err != nil {
		return pool.DiskInfo{}, fmt.Errorf("%w: %w", api.ErrBadRequest, err)
	}
	g.naming.Lock()
	defer g.naming.Unlock()
	if err := g.free(n.Name); err != nil {
		return pool.DiskInfo{}, fmt.Errorf("create disk %s: %w", n.Name, err)
	}
	if n.Pool == "" {
		if len(g.all()) > 1 {
			return pool.DiskInfo{}, fmt.Errorf("%w: the gateway has pools %s: name one with --pool", api.ErrBadRequest, list(slices.Sorted(maps.Keys(g.all()))))
		}
		for name := range g.all() {
			n.Pool = name
		}
		if n.Pool == "" {
			return pool.DiskInfo{}, fmt.Errorf("%w: the gateway serves no pool; see \"gateway pool status\"", api.ErrNoPool)
		}
	}
	p, err := g.poolOf(n.Pool)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	d, err := p.CreateDisk(ctx, n.Name, n.SizeBytes)
	if err != nil {
		return pool.DiskInfo{}, err
	}
	return p.Describe(d), nil
}

// Pools implements api.Gateway.
func (g *gateway) Pools(ctx context.Context) []pool.Status {
	ps := g.sorted()
	ss := make([]pool.Status, len(ps))
	var wg sync.WaitGroup
	for i, p := range ps {
		wg.Go(func() {
			p.LookAtTargets(ctx)
			ss[i] = p.Status()
		})
	}
	wg.Wait()
	return ss
}

// Pool implements api.Gateway.
func (g *gateway) Pool(ctx context.Context, name string) (pool.Status, error) {
	p, err := g.poolOf(name)
	if err != nil {
		return pool.Status{}, err
	}
	p.LookAtTargets(ctx)
	return p.Status(), nil
}
