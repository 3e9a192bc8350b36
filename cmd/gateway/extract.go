package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"graindisk/backend"
	"graindisk/backend/local"
	"graindisk/config"
	"graindisk/pool"
	"graindisk/vdisk"
)

// extractOptions are the flags of extract.
type extractOptions struct {
	list, verify, keepGoing, force, minority bool
}

func newExtractCmd(a *app) *cobra.Command {
	var o extractOptions
	cmd := &cobra.Command{
		Use:   "extract [POOL/]DISK FILE|-",
		Short: "Write a disk's image to a file or stdout, straight from the targets",
		Long: `Read a disk from the targets of the configuration and write its image, raw and sparse, to FILE, or all of it to
stdout. No gateway is needed and none is in the way; nothing is claimed and nothing is written to any target, so keys that
may only read will do. The image is the disk as of the newest published cut: what a running gateway has acknowledged
since is not in it. Targets that are lost are done without while the others suffice; leave no empty directory in their place.

FILE is written as FILE.partial and gets its name when it is whole and stable. With --verify nothing is written: all
that the image needs is read and checked. It ends with 3 if something is lost, and says which bytes of the disk.`,
		Example: `  gateway extract vm1 vm1.raw --config /etc/gateway.yaml
  gateway extract main/vm1 - | qemu-img convert -f raw -O qcow2 /dev/stdin vm1.qcow2
  gateway extract --list`,
		Args: func(_ *cobra.Command, args []string) error { return o.checkArgs(args) },
		RunE: func(cmd *cobra.Command, args []string) error { return runExtract(cmd.Context(), a, o, args) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.list, "list", false, "list the disks of POOL, or of all pools, and write nothing")
	f.BoolVar(&o.verify, "verify", false, "write nothing; read and check all that the image needs")
	f.BoolVar(&o.keepGoing, "keep-going", false, "leave what cannot be read zero in FILE, list it, and end with 3 (1 if targets did not answer)")
	f.BoolVar(&o.force, "force", false, "replace FILE, and FILE.partial, if they exist")
	f.BoolVar(&o.minority, "force-minority", false, "take the newest copy of the root there is, though too few are left to tell that no newer cut was published")
	return cmd
}

func (o extractOptions) checkArgs(args []string) error {
	want, form := 2, "[POOL/]DISK and FILE"
	switch {
	case o.list && o.verify:
		return errors.New("--list and --verify exclude each other")
	case o.list && len(args) > 1:
		return errors.New("--list takes one pool at most")
	case o.list:
		return nil
	case o.verify:
		want, form = 1, "[POOL/]DISK with --verify"
	}
	if len(args) != want {
		return fmt.Errorf("extract takes %s; see \"gateway extract --help\"", form)
	}
	return nil
}

// extracted is the result of extract and of its --verify.
type extracted struct {
	pool.ViewInfo
	Disk      string `json:"disk"`
	SizeBytes int64  `json:"size_bytes"`
	File      string `json:"file,omitempty"`
	DataBytes int64  `json:"data_bytes"` // that were stored, read and checked
	// DegradedShards failed a read, for now or for good; their bytes were had from others.
	DegradedShards int        `json:"degraded_shards"`
	Bad            []badRange `json:"bad"` // what cannot be read
	Seconds        float64    `json:"seconds"`
}

type badRange struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Error  string `json:"error"`

	damaged bool // else it is out of reach, or newer
}

func runExtract(ctx context.Context, a *app, o extractOptions, args []string) error {
	cfg, err := a.loadConfig(nil)
	if err != nil {
		return err
	}
	if o.list {
		return listViews(ctx, a, o, cfg, args)
	}
	name, disk, err := whichDisk(cfg, args[0])
	if err != nil {
		return err
	}
	out := ""
	if !o.verify {
		out = args[1]
	}
	if out == "-" && a.json {
		return usagef("--json and an image both want stdout; give a file")
	}
	if out == "-" && isTerminal(a.stdout) {
		return usagef("an image does not go to a terminal; give a file, or a pipe")
	}
	v, err := openView(ctx, a, o, cfg, name)
	if err != nil {
		return err
	}
	defer v.Close()
	d, err := v.Disk(ctx, disk)
	if errors.Is(err, pool.ErrNoDisk) {
		return fmt.Errorf("pool %s: %w as of cut %d; see \"gateway extract --list\"", name, err, v.Info().Cut)
	}
	if err != nil {
		return err
	}
	defer d.Close()
	a.tellView(v.Info(), d.Info())
	var img image = nothing{}
	switch out {
	case "":
	case "-":
		img = &stream{w: a.stdout}
	default:
		if img, err = createImageFile(out, d.Info().SizeBytes, o.force); err != nil {
			return err
		}
	}
	r, err := copyImage(ctx, a, o, v, d, img)
	if err != nil {
		img.abort()
		return err
	}
	if err := img.finish(); err != nil {
		img.abort()
		return err
	}
	r.File = out
	return a.tellExtracted(o, r)
}

// whichDisk finds the pool and the name of a disk written as [POOL/]DISK.
func whichDisk(cfg *config.Config, arg string) (poolName, disk string, err error) {
	poolName, disk, named := strings.Cut(arg, "/")
	if !named {
		poolName, disk = "", arg
		if len(cfg.Pools) > 1 {
			return "", "", usagef("the configuration has pools %s; write POOL/%s", strings.Join(slices.Sorted(maps.Keys(cfg.Pools)), ", "), arg)
		}
		for n := range cfg.Pools {
			poolName = n
		}
	}
	if d, snap, ok := strings.Cut(disk, "@"); ok {
		return "", "", usagef("%s@%s: this release keeps no snapshots; %s is the disk as of the newest cut", d, snap, d)
	}
	if _, ok := cfg.Pools[poolName]; !ok {
		return "", "", noSuchPool(poolName, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
	}
	return poolName, disk, nil
}

// openView opens a pool's targets, those that can be, to be read.
func openView(ctx context.Context, a *app, o extractOptions, cfg *config.Config, name string) (*pool.View, error) {
	log := newLogger(a, false)
	vo := pool.ViewOptions{Name: name, Minority: o.minority, Log: log}
	for _, t := range cfg.Pools[name].Targets {
		s, err := openReadOnly(ctx, t, log)
		if err != nil {
			log.Warn("target is left out", "target", t.Name, "err", err)
			continue
		}
		vo.Targets = append(vo.Targets, pool.Target{Name: t.Name, Store: adapt(s, t, log), Witness: t.Witness})
	}
	if len(vo.Targets) == 0 {
		return nil, fmt.Errorf("pool %s: none of its targets can be opened", name)
	}
	return pool.OpenView(ctx, vo)
}

// openReadOnly opens a target without leaving a trace in it.
func openReadOnly(ctx context.Context, t config.Target, log *slog.Logger) (backend.Store, error) {
	if t.Local != nil {
		return local.Open(t.Local.Dir, local.Options{ReadOnly: true})
	}
	return openStore(ctx, t, false, 1, log)
}

// listViews prints the disks of pools as extract would find them.
func listViews(ctx context.Context, a *app, o extractOptions, cfg *config.Config, names []string) error {
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(cfg.Pools))
	}
	type listed struct {
		pool.ViewInfo
		Disks []pool.ViewedDisk `json:"disks"`
	}
	var all []listed
	for _, name := range names {
		if _, ok := cfg.Pools[name]; !ok {
			return noSuchPool(name, slices.Sorted(maps.Keys(cfg.Pools)), cfg.Source)
		}
		v, err := openView(ctx, a, o, cfg, name)
		if err != nil {
			return err
		}
		all = append(all, listed{v.Info(), v.Disks()})
		v.Close()
	}
	if a.json {
		return a.printJSON(all)
	}
	t := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tPOOL\tSIZE\tCUT\tTIME")
	for _, l := range all {
		for _, d := range l.Disks {
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", d.Name, l.Pool, sized(d.SizeBytes), l.Cut, clock(l.Time))
		}
	}
	return t.Flush()
}

// copyImage reads the disk into img.
func copyImage(ctx context.Context, a *app, o extractOptions, v *pool.View, d *pool.ViewDisk, img image) (*extracted, error) {
	start := time.Now()
	total, err := d.Stored()
	if err != nil {
		return nil, err
	}
	info := d.Info()
	r := &extracted{ViewInfo: v.Info(), Disk: info.Name, SizeBytes: info.SizeBytes, Bad: []badRange{}}
	m := a.newMeter("read", total)
	defer m.end()
	err = d.Stream(ctx, func(p pool.ViewPart) error {
		switch {
		case p.Err != nil && (errors.Is(p.Err, pool.ErrViewExpired) || !o.verify && !o.keepGoing):
			err := fmt.Errorf("disk %s: bytes %d to %d cannot be read: %w", info.Name, p.Off, p.Off+p.Len-1, p.Err)
			if !errors.Is(err, pool.ErrViewExpired) {
				err = fmt.Errorf("%w; --verify lists all such ranges, --keep-going leaves them zero in the image", err)
			}
			return err
		case p.Err != nil:
			r.addBad(p)
			m.add(p.Len)
			return img.skip(p.Off, p.Len)
		case p.Data == nil:
			return img.skip(p.Off, p.Len)
		}
		r.DataBytes += p.Len
		m.add(p.Len)
		return img.write(p.Off, p.Data)
	})
	r.DegradedShards, r.Seconds = v.DegradedShards(), time.Since(start).Seconds()
	return r, err
}

// addBad notes what cannot be read, neighbours together; the first error speaks for them.
func (r *extracted) addBad(p pool.ViewPart) {
	if n := len(r.Bad); n > 0 && r.Bad[n-1].Offset+r.Bad[n-1].Length == p.Off {
		if last := &r.Bad[n-1]; last.damaged == errors.Is(p.Err, vdisk.ErrDamaged) {
			last.Length += p.Len
			return
		}
	}
	r.Bad = append(r.Bad, badRange{Offset: p.Off, Length: p.Len, Error: p.Err.Error(), damaged: errors.Is(p.Err, vdisk.ErrDamaged)})
}

// tellView says what is about to be read, and what it may lack.
func (a *app) tellView(v pool.ViewInfo, d pool.ViewedDisk) {
	if a.json {
		return
	}
	when := "at an unknown time"
	if !v.Time.IsZero() {
		when = fmt.Sprintf("of %s (%v ago)", clock(v.Time), time.Since(v.Time).Round(time.Second))
	}
	fmt.Fprintf(a.stderr, "disk %s of pool %s: %s, as of cut %d %s, epoch %d\n", d.Name, v.Pool, sized(d.SizeBytes), v.Cut, when, v.Epoch)
	if v.State == "held" {
		fmt.Fprintf(a.stderr, "the pool is held by %s: what that acknowledged since is not in the image\n", v.OwnerName)
	}
	switch {
	case !v.Quorum:
		fmt.Fprintf(a.stderr, "warning: only %d of %d copies of the root could be read: newer cuts may have been published\n", v.Copies, v.Members)
	case !v.Committed:
		fmt.Fprintf(a.stderr, "warning: cut %d may not have been committed, and its last writes may be lost to the pool\n", v.Cut)
	}
}

// tellExtracted prints the result; ranges that cannot be read are an error.
func (a *app) tellExtracted(o extractOptions, r *extracted) error {
	err := r.badError()
	if a.json {
		if perr := a.printJSON(r); perr != nil {
			return perr
		}
		if err != nil {
			return &reportedError{err}
		}
		return nil
	}
	to, what := a.stdout, "written to "+r.File
	switch {
	case o.verify:
		what = "read and checked"
	case r.File == "-":
		to, what = a.stderr, "written"
	}
	for _, b := range r.Bad {
		fmt.Fprintf(to, "disk %s: bytes %d to %d cannot be read: %s\n", r.Disk, b.Offset, b.Offset+b.Length-1, oneLine(b.Error))
	}
	if r.DegradedShards > 0 {
		fmt.Fprintf(to, "%d shards failed and were done without: see \"gateway pool status\" and the log\n", r.DegradedShards)
	}
	fmt.Fprintf(to, "disk %s: %s of data in %.1f s (%s/s), %s\n", r.Disk, rough(float64(r.DataBytes)), r.Seconds,
		rough(float64(r.DataBytes)/max(r.Seconds, 1e-3)), what)
	return err
}

// badError sums up what cannot be read: damage before all else. Nil if there is nothing.
func (r *extracted) badError() error {
	var bytes int64
	damaged := false
	for _, b := range r.Bad {
		bytes += b.Length
		damaged = damaged || b.damaged
	}
	switch {
	case len(r.Bad) == 0:
		return nil
	case damaged:
		return fmt.Errorf("disk %s: %w: %d bytes in %d ranges cannot be read", r.Disk, vdisk.ErrDamaged, bytes, len(r.Bad))
	}
	return fmt.Errorf("disk %s: %d bytes in %d ranges cannot be read now; see which targets do not answer", r.Disk, bytes, len(r.Bad))
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
