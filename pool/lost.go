package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/vfs"
	"graindisk/pool/root"
	"graindisk/writeback"
)

// Lost lists what one owner of a pool acknowledged and did not publish before another took the pool over: the net
// effect of its log above what is published, by disk and range of blocks. It is the file LOST.json beside the
// log, and moves with it into quarantine. The data are in that log.
type Lost struct {
	LostSummary
	Disks []LostDisk `json:"disks"`
}

// LostSummary is all of a Lost but its ranges.
type LostSummary struct {
	Pool     string `json:"pool"` // uuid
	PoolName string `json:"pool_name"`
	Log      string `json:"log"`   // uuid of the log that holds it
	Host     string `json:"host"`  // whose it was
	Epoch    uint64 `json:"epoch"` // the last that it claimed
	// ThroughCut is what is published of this log. If it is not Sure, that may be one cut more: then some of what is
	// listed is not lost.
	ThroughCut uint64 `json:"through_cut"`
	Sure       bool   `json:"sure"`
	// The owner that took over, as far as it is known.
	ByHost     string    `json:"by_host"`
	ByLog      string    `json:"by_log"`
	ByEpoch    uint64    `json:"by_epoch"`
	Time       time.Time `json:"time"` // of the list
	BlockBytes int       `json:"block_bytes"`
	Bytes      int64     `json:"bytes"`  // written, net
	Ranges     int       `json:"ranges"` // written or unmapped
}

// LostDisk is what was lost of one disk.
type LostDisk struct {
	Disk       block.DiskID `json:"disk"`
	Name       string       `json:"name"`       // empty if nothing says it
	Operations int          `json:"operations"` // creations and the like
	Bytes      int64        `json:"bytes"`
	Written    []LostRange  `json:"written"`
	Unmapped   []LostRange  `json:"unmapped"`
}

// LostRange is [first block, count].
type LostRange [2]uint64

const (
	lostName   = writeback.LostName
	lostMagic  = "graindisk lost writes"
	lostFormat = 1
)

// DecodeLost reads a LOST.json.
func DecodeLost(b []byte) (*Lost, error) {
	l := new(Lost)
	if err := unseal(lostMagic, lostFormat, b, l); err != nil {
		return nil, err
	}
	return l, nil
}

// listLost makes the list of what p's log holds beyond horizon. names are those of disks.
func (p *Pool) listLost(horizon writeback.Seq, names map[block.DiskID]string) *Lost {
	l := &Lost{LostSummary: LostSummary{
		Pool: p.uuid.String(), PoolName: p.o.Name, Log: p.logID.String(), Host: p.o.Host, Epoch: p.epoch.Load(),
		Sure: true, Time: time.Now().UTC(), BlockBytes: block.Size,
	}, Disks: []LostDisk{}}
	for _, r := range p.log.Beyond(horizon) {
		d := LostDisk{Disk: r.Disk, Name: names[r.Disk], Operations: r.Operations, Written: lostRanges(r.Written), Unmapped: lostRanges(r.Unmapped)}
		for _, w := range r.Written {
			d.Bytes += int64(w.Blocks) * block.Size
		}
		l.Bytes += d.Bytes
		l.Ranges += len(d.Written) + len(d.Unmapped)
		l.Disks = append(l.Disks, d)
	}
	return l
}

func lostRanges(rs []writeback.Range) []LostRange {
	out := make([]LostRange, len(rs))
	for i, r := range rs {
		out[i] = LostRange{uint64(r.LBA), r.Blocks}
	}
	return out
}

// by notes who took over, by its copy of the root.
func (l *Lost) by(c *root.Copy) {
	l.ByHost, l.ByLog, l.ByEpoch = c.Val.OwnerName, c.Val.Owner, c.Accepted.Epoch
}

// Empty tells that nothing is lost.
func (l *Lost) Empty() bool { return len(l.Disks) == 0 }

// String says in a line what is lost of each disk.
func (l *Lost) String() string {
	if l.Empty() {
		return "nothing: everything that was acknowledged is published"
	}
	var parts []string
	for _, d := range l.Disks {
		name := d.Name
		if name == "" {
			name = fmt.Sprintf("#%d", d.Disk)
		}
		s := fmt.Sprintf("disk %s: %d bytes in %d ranges", name, d.Bytes, len(d.Written))
		if len(d.Unmapped) > 0 {
			s += fmt.Sprintf(", %d ranges unmapped", len(d.Unmapped))
		}
		if d.Operations > 0 {
			s += fmt.Sprintf(", %d operations", d.Operations)
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, "; ")
}

// Describe prints the list for people.
func (l *Lost) Describe(w io.Writer) {
	sure := ""
	if !l.Sure {
		sure = " or one cut more, so that some of this may not be lost"
	}
	fmt.Fprintf(w, "log          %s of pool %s (%s), epoch %d, on %q\n", l.Log, l.PoolName, l.Pool, l.Epoch, l.Host)
	fmt.Fprintf(w, "taken over   by %q (log %s) in epoch %d; found out at %s\n", l.ByHost, l.ByLog, l.ByEpoch, l.Time.UTC().Format(time.RFC3339))
	fmt.Fprintf(w, "published    through cut %d%s\n", l.ThroughCut, sure)
	fmt.Fprintf(w, "not          %s\n", l)
	for _, d := range l.Disks {
		fmt.Fprintf(w, "disk         %d %q: %d bytes written, %d operations\n", d.Disk, d.Name, d.Bytes, d.Operations)
		for _, part := range []struct {
			what string
			rs   []LostRange
		}{{"written", d.Written}, {"unmapped", d.Unmapped}} {
			for _, r := range part.rs {
				fmt.Fprintf(w, "  %-10s blocks %d to %d, bytes %d to %d\n", part.what, r[0], r[0]+r[1]-1, r[0]*block.Size, (r[0]+r[1])*block.Size-1)
			}
		}
	}
}

// publishedThrough tells through which cut and horizon a later owner's root v holds what this log has: all that
// was committed, and maybe the one cut whose outcome this log never learnt. It is not sure if that cut cannot be read.
func (p *Pool) publishedThrough(ctx context.Context, v root.Value) (cut uint64, horizon writeback.Seq, sure bool) {
	cut, horizon = p.pub.cut, p.pub.horizon
	if v.Cut <= cut {
		return cut, horizon, true
	}
	for _, ref := range v.Cuts {
		switch {
		case ref.Cut != cut+1:
		case ref.Segment.Epoch > p.epoch.Load(): // the other's own
			return cut, horizon, true
		case ref.Cut == v.Cut:
			return ref.Cut, writeback.Seq(v.Horizon), true
		default:
			rec, _, err := segment.ReadCut(ctx, p.segmentStore, refInfo(ref))
			if err != nil {
				p.o.Log.Warn("cut record not read: what is listed as lost may be too much", "pool", p.o.Name, "cut", ref.Cut, "err", err)
				return cut, horizon, false
			}
			return ref.Cut, writeback.Seq(rec.Horizon), true
		}
	}
	return cut, horizon, false // a checkpoint of the other's has taken its place
}

// writeLost makes the list stable in the tier's folder, in the place of an earlier one.
func (p *Pool) writeLost(l *Lost) (err error) {
	b, err := seal(lostMagic, lostFormat, l)
	if err != nil {
		return err
	}
	name := path.Join(p.o.TierDir, lostName)
	f, err := p.o.FS.Create(name + ".tmp")
	if err != nil {
		return fmt.Errorf("list of lost writes: %w", err)
	}
	if _, err = f.WriteAt(b, 0); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = p.o.FS.Rename(name+".tmp", name)
	}
	if err == nil {
		err = p.o.FS.SyncDir(p.o.TierDir)
	}
	if err != nil {
		return fmt.Errorf("list of lost writes: %w", err)
	}
	return nil
}

// ReadLost reads the list in dir, a folder in quarantine or that of a pool's tier; fs.ErrNotExist if there is none.
func ReadLost(fsys vfs.FS, dir string) (*Lost, error) {
	name := path.Join(dir, lostName)
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if n > 0 {
		if _, err := f.ReadAt(b, 0); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	l, err := DecodeLost(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

// Quarantine is a log that lost its pool and was set aside on the tier.
type Quarantine struct {
	Dir string `json:"dir"`
	// Lost is what it holds that was never published; nil if it holds nothing of that kind, or if that cannot be read, as
	// Error says.
	Lost  *LostSummary `json:"lost,omitempty"`
	Error string       `json:"error,omitempty"`
}

// readQuarantines lists the logs in quarantine on a tier.
func readQuarantines(fsys vfs.FS, tier string) ([]Quarantine, error) {
	entries, err := fsys.ReadDir(tier)
	if err != nil {
		return nil, err
	}
	var qs []Quarantine
	for _, e := range entries {
		if !e.IsDir() || !isQuarantine(e.Name()) {
			continue
		}
		q := Quarantine{Dir: path.Join(tier, e.Name())}
		switch l, err := ReadLost(fsys, q.Dir); {
		case err == nil:
			q.Lost = &l.LostSummary
		case !errors.Is(err, fs.ErrNotExist):
			q.Error = err.Error()
		}
		qs = append(qs, q)
	}
	return qs, nil
}
