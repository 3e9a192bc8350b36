package pool

import (
	"encoding/binary"
	"encoding/json"
	"fmt"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/planted"
	"graindisk/pool/root"
	"graindisk/vdisk/densetree"
	"graindisk/writeback"
)

// Kinds of the pool's records in the metadata log.
const (
	metaEpoch       uint8 = 16 // u64 epoch, about to be claimed
	metaPublication uint8 = 17 // see encodePublication
)

func encodeEpoch(e uint64) []byte { return binary.LittleEndian.AppendUint64(nil, e) }

func decodeEpoch(b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, fmt.Errorf("epoch record of %d bytes: %w", len(b), writeback.ErrDamaged)
	}
	return binary.LittleEndian.Uint64(b), nil
}

// encodePublication is the record that a cut has been committed, with all that the maps need of it:
//
//	u32 length | cut record     as in the cut's last segment
//	u32 number of segments, then for each, the last one last:
//	u32 length | segment info
//	u32 length | segment index  as in the segment's shards
func encodePublication(rec *segment.CutRecord, infos []segment.Info, idx []*segment.Index) []byte {
	b := appendBytes(nil, rec.Append(nil))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(infos)))
	for i := range infos {
		b = appendBytes(b, infos[i].Append(nil))
		b = appendBytes(b, idx[i].Append(nil))
	}
	return b
}

func decodePublication(b []byte) (*segment.CutRecord, []segment.Info, []*segment.Index, error) {
	d := decoder{b: b}
	rec, err := segment.DecodeCutRecord(d.bytes())
	if err != nil {
		return nil, nil, nil, err
	}
	n := d.u32()
	var infos []segment.Info
	var idx []*segment.Index
	for range n {
		info, _, err := segment.DecodeInfo(d.bytes())
		if err != nil {
			return nil, nil, nil, err
		}
		x, err := segment.DecodeIndex(d.bytes())
		if err != nil {
			return nil, nil, nil, err
		}
		infos, idx = append(infos, info), append(idx, x)
	}
	if d.bad || len(d.b) != 0 || n == 0 {
		return nil, nil, nil, fmt.Errorf("publication record: %w", writeback.ErrDamaged)
	}
	return rec, infos, idx, nil
}

func appendBytes(b, p []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
}

// decoder takes values off a slice; bad says that it ran out.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) u32() uint32 {
	if len(d.b) < 4 {
		d.bad, d.b = true, nil
		return 0
	}
	v := binary.LittleEndian.Uint32(d.b)
	d.b = d.b[4:]
	return v
}

func (d *decoder) bytes() []byte {
	n := d.u32()
	if uint64(n) > uint64(len(d.b)) {
		d.bad, d.b = true, nil
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

// A snapshot is the published state of a pool as of one cut: what a checkpoint holds, local or
// published, beside the runs and the cache's index. It is stored as JSON. Where it would become long,
// Disks and Segments are in tables of their own.
type snapshot struct {
	Format   int            `json:"format"`
	Epoch    uint64         `json:"epoch"`
	Cut      uint64         `json:"cut"`
	CutCRC   uint32         `json:"cut_crc"`
	Horizon  uint64         `json:"horizon"`
	NextDisk uint32         `json:"next_disk"`
	Disks    []diskState    `json:"disks"`
	Segments []segment.Info `json:"segments"`
	Usage    []runRef       `json:"usage,omitempty"`  // blobs of the usage table; without any it is recounted
	Tables   []tableRef     `json:"tables,omitempty"` // published checkpoints: where the rest of the two is
	Root     *root.Value    `json:"root,omitempty"`   // local checkpoints: the root as last committed
}

// The first release wrote format 1, without tables and files, and reads nothing newer. Format 3 has partial runs, in
// local checkpoints only; a snapshot without them stays of format 2.
const (
	snapshotFormat    = 2
	snapshotFormatMax = 3
)

type diskState struct {
	Disk block.DiskID     `json:"disk"`
	Meta segment.DiskMeta `json:"meta"`
	Runs []runRef         `json:"runs"`           // newest level first
	Boot []byte           `json:"boot,omitempty"` // published checkpoints: the boot profile, encoded
}

// runRef is where an encoded run lies: in a file of the tier, in a published checkpoint's part, or in a
// local checkpoint. A local checkpoint names the part too if it names a file, so that the next
// published checkpoint need not store the run again.
type runRef struct {
	ID    uint64 `json:"id"`
	File  uint64 `json:"file,omitempty"`  // number of the file on the tier
	Epoch uint64 `json:"epoch,omitempty"` // the published checkpoint that first held it
	N     uint64 `json:"n,omitempty"`
	Part  int    `json:"part,omitempty"`
	// Partial says of a file that it may lack all but the head: the part has the rest.
	Partial bool  `json:"partial,omitempty"`
	Off     int64 `json:"off"` // in the part, or in the local checkpoint if neither file nor part is named
	Len     int64 `json:"len"`
}

// snapshotNow describes the published state; place says where each run goes, put where other bytes go.
func (p *Pool) snapshotNow(v mapsView, place func(*densetree.Run) (runRef, error), put func([]byte) (runRef, error)) (*snapshot, error) {
	s := &snapshot{
		Format: snapshotFormat, Epoch: p.epoch.Load(), Cut: p.pub.cut, CutCRC: p.pub.cutCRC, Horizon: uint64(p.pub.horizon),
	}
	s.Segments = v.segments
	for _, id := range v.disks() {
		d := diskState{Disk: id, Meta: p.pub.disks[id]}
		for _, r := range v.trees[id].Runs() {
			ref, err := place(r)
			if err != nil {
				return nil, err
			}
			d.Runs = append(d.Runs, ref)
		}
		s.Disks = append(s.Disks, d)
		s.NextDisk = max(s.NextDisk, uint32(id)+1)
	}
	s.sort()
	var err error
	s.Usage, err = encodeUsage(v.usage, put)
	return s, err
}

// encodeState is the pool's part of a local checkpoint:
//
//	u32 length | snapshot (JSON) | u32 length | runs and usage table back to back | u32 length | old cache index
//
// The runs are those that are in memory, levels 0; the others are in files, stable already, and named: if a file may
// lack pages, as a partial run, with the place where a published checkpoint has them. The
// last part is empty: the cache keeps its index itself. States written before that have it here.
func (p *Pool) encodeState(v mapsView) ([]byte, error) {
	var runs []byte
	var stored map[uint64]runRef
	if m := p.storedRuns.Load(); m != nil {
		stored = *m
	}
	put := func(b []byte) (runRef, error) {
		ref := runRef{Off: int64(len(runs)), Len: int64(len(b))}
		runs = append(runs, b...)
		return ref, nil
	}
	partial := false
	s, err := p.snapshotNow(v, func(r *densetree.Run) (runRef, error) {
		if r.File() != 0 {
			ref := stored[r.ID] // no part if it was not published yet
			if r.Partial() {
				ref, _ = p.far.ref(r.ID)
				partial = true
				ref.Partial = !planted.Bug("recovery: a partial run counts as complete")
			}
			ref.ID, ref.File = r.ID, r.File()
			return ref, nil
		}
		b, err := r.Encode()
		if err != nil {
			return runRef{}, err
		}
		ref, err := put(b)
		ref.ID = r.ID
		return ref, err
	}, put)
	if err != nil {
		return nil, err
	}
	if partial {
		s.Format = snapshotFormatMax
	}
	val := p.value()
	s.Root = &val
	head, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	b := appendBytes(nil, head)
	b = appendBytes(b, runs)
	return appendBytes(b, nil), nil
}

// loadState restores what encodeState wrote.
func (p *Pool) loadState(b []byte) error {
	d := decoder{b: b}
	head, runs, warm := d.bytes(), d.bytes(), d.bytes()
	if d.bad || len(d.b) != 0 {
		return fmt.Errorf("state of %d bytes: %w", len(b), writeback.ErrDamaged)
	}
	s, err := decodeSnapshot(head)
	if err != nil {
		return err
	}
	if s.Root == nil {
		return fmt.Errorf("state without a root: %w", writeback.ErrDamaged)
	}
	p.val = *s.Root
	p.raiseEpoch(s.Epoch)
	stored := map[uint64]runRef{}
	get := func(ref runRef) ([]byte, error) {
		if ref.Off < 0 || ref.Len < 0 || ref.Off > int64(len(runs))-ref.Len {
			return nil, fmt.Errorf("run %d outside the state: %w", ref.ID, writeback.ErrDamaged)
		}
		return runs[ref.Off : ref.Off+ref.Len], nil
	}
	err = p.loadTrees(s, func(ref runRef) (*densetree.Run, error) {
		if ref.File != 0 {
			open := p.runs.Open
			if ref.Partial {
				open = p.runs.OpenPartial
			}
			r, err := open(ref.File, ref.ID)
			far := ref.Partial
			if ref.File, ref.Partial = 0, false; err == nil && ref.Epoch != 0 {
				stored[ref.ID] = ref
			}
			if far {
				p.far.setRef(ref)
			}
			return r, err
		}
		b, err := get(ref)
		if err != nil {
			return nil, err
		}
		return densetree.DecodeRun(b)
	}, get)
	p.setStored(stored)
	p.pub.ckpt.old = true
	if err != nil {
		return err
	}
	if err := p.cache.Restore(warm, p.space.Busy); err != nil {
		p.o.Log.Warn("cache starts cold", "pool", p.o.Name, "err", err)
	}
	return nil
}

func decodeSnapshot(b []byte) (*snapshot, error) {
	s := new(snapshot)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	if s.Format < 1 || s.Format > snapshotFormatMax {
		return nil, fmt.Errorf("snapshot format %d; this gateway reads up to %d: %w", s.Format, snapshotFormatMax, writeback.ErrNewer)
	}
	return s, validSegments(s.Segments)
}

func validSegments(infos []segment.Info) error {
	for _, i := range infos {
		if err := i.Validate(); err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
	}
	return nil
}

// cutRef is how the root names a cut's last segment; refInfo is the way back.
func cutRef(rec *segment.CutRecord, last segment.Info) root.CutRef {
	return root.CutRef{Cut: rec.Cut, Segment: root.SegmentRef{
		ID: last.ID, Epoch: last.Epoch, K: last.K, M: last.M, Targets: last.Targets,
		ShardBytes: last.ShardBytes, IndexBytes: last.IndexBytes, RecordBytes: last.CutBytes,
		Extents: last.Extents, Payload: last.PayloadBytes, CRC: rec.CRC(),
	}}
}

func refInfo(ref root.CutRef) segment.Info {
	s := ref.Segment
	return segment.Info{
		ID: s.ID, Epoch: s.Epoch, K: s.K, M: s.M, Targets: s.Targets,
		ShardBytes: s.ShardBytes, IndexBytes: s.IndexBytes, CutBytes: s.RecordBytes,
		Extents: s.Extents, PayloadBytes: s.Payload,
	}
}
